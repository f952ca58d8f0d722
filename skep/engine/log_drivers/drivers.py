"""The log drivers of a node."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from skep.engine.log_drivers import fluentd, gelf, journald, splunk, syslog
from skep.engine.log_drivers.facts import LogFacts
from skep.engine.log_drivers.message import LogSink
from skep.engine.log_drivers.options import FILE_DRIVERS, Check, Options
from skep.linux.network.guard import Guard

JOURNAL = journald.SOCKET

SINKS: Mapping[str, Callable[[Options, LogFacts, Guard], LogSink]] = MappingProxyType(
    {
        "fluentd": fluentd.Fluentd,
        "gelf": gelf.Gelf,
        "journald": journald.Journald,
        "splunk": splunk.Splunk,
        "syslog": syslog.Syslog,
    }
)
_CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "fluentd": fluentd.check,
        "gelf": gelf.check,
        "journald": journald.check,
        "splunk": splunk.check,
        "syslog": syslog.check,
    }
)


def sending_drivers(journal: Path = JOURNAL) -> Mapping[str, Check]:
    """Return the drivers that send output to a remote, each with the function that checks its options.

    On a machine without the socket ``journal``, journald is left out, so that services with this driver are placed on
    other nodes.
    """
    if journal.exists():
        return _CHECKS
    return {name: check for name, check in _CHECKS.items() if name != "journald"}


def log_drivers(journal: Path = JOURNAL) -> tuple[str, ...]:
    """Return the drivers that the node announces.  ``none`` is available everywhere."""
    return (*FILE_DRIVERS, *sending_drivers(journal))
