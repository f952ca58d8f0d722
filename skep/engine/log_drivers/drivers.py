"""The log drivers of a node."""

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from skep.engine.log_drivers.options import FILE_DRIVERS, JOURNAL, Check, Options

_NAMES = ("fluentd", "gelf", "journald", "splunk", "syslog")


def _check(name: str, options: Options) -> None:
    """Check the options of the driver ``name``.  Its module is imported now, because few containers use it."""
    importlib.import_module(f"skep.engine.log_drivers.{name}").check(options)


_CHECKS: Mapping[str, Check] = MappingProxyType({name: partial(_check, name) for name in _NAMES})


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
