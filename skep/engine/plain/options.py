"""Options of ``docker run`` that this node does not act on: refused by name, never dropped.  Pure.

A client sends every option with the value that means nothing; only what says something is refused.  An option that
this module does not know is refused as soon as it says something.
"""

from collections.abc import Mapping
from typing import Any, Final

from skep.errors import Unimplemented

_ACTED_ON: Final = frozenset(
    {
        *(
            "binds",
            "logconfig",
            "networkmode",
            "portbindings",
            "publishallports",
            "restartpolicy",
            "autoremove",
        ),
        *("capadd", "capdrop", "dns", "dnsoptions", "dnssearch", "extrahosts", "groupadd", "oomscoreadj"),
        *("readonlyrootfs", "securityopt", "tmpfs", "mounts", "shmsize", "sysctls", "memory"),
        *("memoryreservation", "nanocpus", "cpuperiod", "cpuquota", "pidslimit", "ulimits", "init"),
        # The client's own business.
        *("containeridfile", "consolesize"),
    }
)
_CONFIG_ACTED_ON: Final = frozenset(
    {
        *("hostname", "user", "attachstdin", "attachstdout", "attachstderr", "exposedports", "tty"),
        *(
            "openstdin",
            "stdinonce",
            "env",
            "cmd",
            "entrypoint",
            "healthcheck",
            "image",
            "volumes",
            "workingdir",
        ),
        *("labels", "stopsignal", "stoptimeout", "hostconfig", "networkingconfig"),
        # Of images: ``docker build`` reads them, running does not.
        *("onbuild", "shell", "argsescaped"),
    }
)
_ENDPOINT_ACTED_ON: Final = frozenset(
    {
        *("ipamconfig", "aliases"),
        # What an engine fills in; clients that copy an answer send it back.
        *(
            "networkid",
            "endpointid",
            "gateway",
            "ipaddress",
            "ipprefixlen",
            "ipv6gateway",
            "globalipv6address",
        ),
        *("globalipv6prefixlen", "dnsnames"),
    }
)
_NOTHING: Final[tuple[Any, ...]] = (None, "", 0, False, [], {})
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "cgroupnsmode": (None, "", "private"),
    "ipcmode": (None, "", "private"),
    "isolation": (None, "", "default"),
    "memoryswappiness": (None, -1),
    "maskedpaths": (None,),  # an empty list would show what Docker hides
    "readonlypaths": (None,),
    "runtime": (None, "", "runc"),
    "volumedriver": (None, "", "local"),
}
_OPTIONS: Final[Mapping[str, str]] = {
    "privileged": "--privileged",
    "devices": "--device",
    "devicerequests": "--gpus",
    "devicecgrouprules": "--device-cgroup-rule",
    "pidmode": "--pid",
    "ipcmode": "--ipc",
    "utsmode": "--uts",
    "usernsmode": "--userns",
    "cgroupnsmode": "--cgroupns",
    "cgroupparent": "--cgroup-parent",
    "volumesfrom": "--volumes-from",
    "volumedriver": "--volume-driver",
    "links": "--link",
    "runtime": "--runtime",
    "cpushares": "--cpu-shares",
    "cpusetcpus": "--cpuset-cpus",
    "cpusetmems": "--cpuset-mems",
    "cpurealtimeperiod": "--cpu-rt-period",
    "cpurealtimeruntime": "--cpu-rt-runtime",
    "blkioweight": "--blkio-weight",
    "blkioweightdevice": "--blkio-weight-device",
    "blkiodevicereadbps": "--device-read-bps",
    "blkiodevicewritebps": "--device-write-bps",
    "blkiodevicereadiops": "--device-read-iops",
    "blkiodevicewriteiops": "--device-write-iops",
    "kernelmemory": "--kernel-memory",
    "memoryswap": "--memory-swap",
    "memoryswappiness": "--memory-swappiness",
    "oomkilldisable": "--oom-kill-disable",
    "storageopt": "--storage-opt",
    "isolation": "--isolation",
    "annotations": "--annotation",
    "maskedpaths": "--security-opt systempaths",
    "readonlypaths": "--security-opt systempaths",
    "domainname": "--domainname",
    "macaddress": "--mac-address",
    "driveropts": "--network driver-opt",
    "linklocalips": "--link-local-ip",
    "ipv6address": "--ip6",
}


def check_host(host: Any) -> None:
    """``host``: the JSON of ``HostConfig``.  Raises: Unimplemented."""
    for name, value in _said(host):
        # Docker's default of swap, twice the memory, is what a limit has here, too.
        if name == "memoryswap" and value == 2 * (host.get("Memory") or 0):
            continue
        if name not in _ACTED_ON:
            raise refused(name)


def check_config(config: Any) -> None:
    """``config``: the whole JSON.  Raises: Unimplemented."""
    for name, _ in _said(config):
        if name not in _CONFIG_ACTED_ON:
            raise refused(name)


def check_endpoint(endpoint: Any) -> None:
    """``endpoint``: the JSON of one network.  Raises: Unimplemented."""
    for name, value in _said(endpoint):
        if name not in _ENDPOINT_ACTED_ON:
            raise refused(name)
        if name == "ipamconfig":
            for inner, _ in _said(value):
                if inner != "ipv4address":
                    raise refused(inner)


def refused(name: str) -> Unimplemented:
    """The sentence for an option that is not acted on.  ``name``: of its field, in lower case, or the option itself."""
    return Unimplemented(
        f"containers that Skep runs itself do not have {_OPTIONS.get(name, name)}: leave it out, or give skep a Docker "
        "Engine (--engine-socket) for plain containers"
    )


def _said(value: Any) -> list[tuple[str, Any]]:
    """The fields that say something, in lower case."""
    if not isinstance(value, dict):
        return []
    found = []
    for name, one in value.items():
        folded = str(name).casefold()
        if not any(one == nothing for nothing in _NEUTRAL.get(folded, _NOTHING)):
            found.append((folded, one))
    return found
