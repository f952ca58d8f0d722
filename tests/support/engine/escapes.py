"""Attempts to escape from a container, and their outcomes, for any engine that runs Python in a container."""

import errno
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

Python = Callable[..., Awaitable[Any]]
"""Runs a script with these arguments in a new container, and returns its JSON output.  Keywords are the options in
``WAYS``.
"""

EPERM, ENOSYS, EROFS, ESRCH = errno.EPERM, errno.ENOSYS, errno.EROFS, errno.ESRCH
NEW_USER, NEW_NET, NEW_NS = 0x10000000, 0x40000000, 0x00020000

CALLS: dict[str, tuple[int, list[Any], int]] = {
    # name: number, arguments, the error that Docker's containers get
    "unshare user": (272, [NEW_USER], EPERM),
    "unshare mount": (272, [NEW_NS], EPERM),
    "clone user": (56, [NEW_USER | 17, 0, 0, 0, 0], EPERM),
    "clone net": (56, [NEW_NET | 17, 0, 0, 0, 0], EPERM),
    "clone3": (435, [0, 0], ENOSYS),
    "setns": (308, [0, 0], EPERM),
    "mount": (165, ["x", "/tmp", "tmpfs", 0, 0], EPERM),
    "umount2": (166, ["/proc", 2], EPERM),
    "pivot_root": (155, ["/tmp", "/tmp"], EPERM),
    "fsopen": (430, ["tmpfs", 0], EPERM),
    "fsconfig": (431, [0, 0, 0, 0, 0], EPERM),
    "fsmount": (432, [0, 0, 0], EPERM),
    "fspick": (433, [-100, "/", 0], EPERM),
    "open_tree": (428, [-100, "/", 1], EPERM),
    "move_mount": (429, [0, "", 0, "", 0], EPERM),
    "mount_setattr": (442, [0, "", 0, 0, 0], EPERM),
    "keyctl": (250, [0, -3, 0], EPERM),
    "add_key": (248, ["user", "x", "y", 1, -3], EPERM),
    "request_key": (249, ["user", "x", 0, -3], EPERM),
    "bpf": (321, [0, 0, 0], EPERM),
    "perf_event_open": (298, [0, 0, -1, -1, 0], EPERM),
    "userfaultfd": (323, [0], EPERM),
    "io_uring_setup": (425, [1, 0], EPERM),
    "open_by_handle_at": (304, [-100, 0, 0], EPERM),
    "kexec_load": (246, [0, 0, 0, 0], EPERM),
    "init_module": (175, [0, 0, ""], EPERM),
    "finit_module": (313, [0, "", 0], EPERM),
    "delete_module": (176, ["x", 0], EPERM),
    "swapon": (167, ["/x", 0], EPERM),
    "reboot": (169, [0, 0, 0, 0], EPERM),
    "acct": (163, [0], EPERM),
    "iopl": (172, [3], EPERM),
    "ioperm": (173, [0, 1, 1], EPERM),
    "settimeofday": (164, [0, 0], EPERM),
    "clock_settime": (227, [0, 0], EPERM),
    "sethostname": (170, ["x", 1], EPERM),
    "syslog": (103, [3, 0, 0], EPERM),
    "quotactl": (179, [0, 0, 0, 0], EPERM),
    "pidfd_getfd": (438, [0, 0, 0], EPERM),
    "process_madvise": (440, [0, 0, 0, 0, 0], EPERM),
    "kcmp": (312, [1, 1, 0, 0, 0], EPERM),
    "vhangup": (153, [], EPERM),
    "mbind": (237, [0, 0, 0, 0, 0, 0], EPERM),
    "set_mempolicy": (238, [0, 0, 0], EPERM),
    "fanotify_init": (300, [0, 0], EPERM),
    "personality": (135, [0x40000], EPERM),
    "vsock": (41, [40, 1, 0], EPERM),
    "crypto sockets": (41, [38, 5, 0], EPERM),
    "an unknown call": (600, [], ENOSYS),
}
TRY_CALLS = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
found = {}
for name, (number, arguments) in json.loads(sys.argv[1]).items():
    words = [one.encode() if isinstance(one, str) else ctypes.c_long(one) for one in arguments]
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *words)
    if number == 56 and result == 0:
        os._exit(0)
    found[name] = ctypes.get_errno() if result < 0 else f"gave {result}"
print(json.dumps(found))
"""


TRY_FILES = """
import json, os, stat
def tried(act):
    try:
        return act()
    except OSError as error:
        return error.errno
def write(path):
    return tried(lambda: os.close(os.open(path, os.O_WRONLY)) or "written")
def read(path):
    return tried(lambda: "something" if open(path, "rb").read(64) else "nothing")
def device(name, kind, major, minor):
    made = tried(lambda: os.mknod(f"/tmp/{name}", kind | 0o600, os.makedev(major, minor)) or "made")
    return [made, tried(lambda: os.close(os.open(f"/tmp/{name}", os.O_RDWR)) or "opened")]
cgroups = [one.split()[1] for one in open("/proc/self/mounts") if one.split()[1].startswith("/sys/fs/cgroup/")]
def mounts():
    for line in open("/proc/self/mountinfo"):
        before, after = line.split(" - ")
        point, options = before.split()[4:6]
        if point.startswith(("/proc", "/sys", "/dev")) and not point.startswith("/sys/fs/cgroup/"):
            flags = sorted({*options.split(",")} - {"relatime", "rw"})
            yield point, " ".join([after.split()[0], *flags])
status = dict(line.rstrip().split(":\t") for line in open("/proc/self/status") if ":\t" in line)
print(json.dumps({
    "writes": {path: write(path) for path in (
        "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches",
        "/proc/sysrq-trigger", "/sys/kernel/uevent_seqnum", "/sys/kernel/mm/transparent_hugepage/enabled",
        "/proc/uptime")},
    "reads": {path: read(path) for path in (
        "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/interrupts", "/proc/latency_stats",
        "/proc/sched_debug")},
    "hidden": {path: tried(lambda: os.listdir(path)) for path in ("/proc/acpi", "/proc/scsi", "/sys/firmware",
        "/sys/devices/virtual/powercap") if os.path.isdir(path)},
    "cgroups": sorted({str(tried(lambda: os.mkdir(f"{one}/x") or "made"))
        for one in cgroups or ["/sys/fs/cgroup"]}),
    "disk": device("disk", stat.S_IFBLK, 8, 0), "memory": device("memory", stat.S_IFCHR, 1, 1),
    "kmsg": device("kmsg", stat.S_IFCHR, 1, 11), "null": device("null", stat.S_IFCHR, 1, 3),
    "others": [pid for pid in os.listdir("/proc") if pid.isdigit()],
    "mounts": dict(mounts()),
    "status": {name: status.get(name) for name in
        ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters")},
}))
"""


TRACE = """
import ctypes, json, sys
libc = ctypes.CDLL(None, use_errno=True)
found = {}
for name, call in {"attach": (101, 16), "kill": (62, None), "read": (310, None)}.items():
    pid = ctypes.c_long(int(sys.argv[1]))
    words = [ctypes.c_long(16), pid, 0, 0] if name == "attach" else [pid, 9] if name == "kill" else [pid, 0, 0, 0, 0, 0]
    result = libc.syscall(ctypes.c_long(call[0]), *words)
    found[name] = ctypes.get_errno() if result < 0 else "done"
print(json.dumps(found))
"""


KEYRING = """
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
session = libc.syscall(ctypes.c_long(250), 0, ctypes.c_long(-3), 0)
key = libc.syscall(ctypes.c_long(248), b"user", b"skep-test", b"secret", ctypes.c_long(6), ctypes.c_long(-3))
print(json.dumps({"session": session, "key": key, "errno": ctypes.get_errno()}))
"""


WAYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "root": {},
    "a user": {"user": "1000:1000"},
    "root without capabilities": {"capability_drop": ("ALL",)},
    "root without a filter": {"seccomp": "unconfined"},
}


async def outcomes(python: Python, victim: int) -> dict[str, str]:
    """Return how each attempt ended: the name of its error, or its result.  ``victim``: a process of the machine."""
    asked = json.dumps({name: (number, arguments) for name, (number, arguments, _) in CALLS.items()})
    found: dict[str, str] = {}
    for way, options in WAYS.items():
        calls = await python(TRY_CALLS, asked, **options)
        found |= {f"{name}, as {way}": _word(outcome) for name, outcome in calls.items()}
        files = await python(TRY_FILES, **options)
        found |= {f"{what}, as {way}": word for what, word in _of_files(files).items()}
        traced = await python(TRACE, str(victim), **options)
        found |= {f"{name} a process of the machine, as {way}": _word(end) for name, end in traced.items()}
    keys = [await python(KEYRING, seccomp="unconfined") for _ in range(2)]
    found["a session keyring of its own"] = str(keys[0]["session"] != keys[1]["session"])
    return found


def _of_files(found: Mapping[str, Any]) -> dict[str, str]:
    words = {f"write {path}": _word(end) for path, end in found["writes"].items()}
    words |= {f"read {path}": _word(end) for path, end in found["reads"].items()}
    words |= {f"list {path}": _word(entries) for path, entries in found["hidden"].items()}
    words |= {f"mount {point}": kind for point, kind in found["mounts"].items()}
    words |= {f"{name} of its process": str(value) for name, value in found["status"].items()}
    words |= {
        f"device {name}": " ".join(map(_word, found[name])) for name in ("disk", "memory", "kmsg", "null")
    }
    return words | {"a cgroup": " ".join(found["cgroups"]), "processes in sight": str(found["others"])}


def _word(outcome: object) -> str:
    """Return an error's name, or "done" for any number that a call returned."""
    if isinstance(outcome, str):
        return "done" if outcome.startswith("gave") else outcome
    return errno.errorcode.get(outcome, str(outcome)) if isinstance(outcome, int) else str(outcome)


def lead_etc_out(tree: Path, outside: Path) -> None:
    """Replace /etc of an image by a link to a directory of the machine, with a file that engines mount over."""
    outside.mkdir()
    (outside / "hosts").write_text("of the machine")
    (tree / "etc").rename(tree / "etc-of-the-image")
    (tree / "etc").symlink_to(f"../../../../../../../../../..{outside}")


WRITE_TO_ETC: Final = (
    "sh",
    "-c",
    "echo written >> /etc/hosts; echo x > /etc/new; cat /etc/hosts /etc/hostname",
)


def is_as_it_was(outside: Path) -> bool:
    """Return whether nothing was changed through the link of ``lead_etc_out``."""
    content = (outside / "hosts").read_text()
    return content == "of the machine" and [path.name for path in outside.iterdir()] == ["hosts"]


ABSURD_NUMBER: Final = "9" * 5000
SPOIL_GROUPS: Final = f"echo g:x:{ABSURD_NUMBER}:root >> /etc/group"


def spoil_users(tree: Path) -> None:
    """Insert users and groups with absurd numbers and names before the entries of an image."""
    passwd, group = tree / "etc/passwd", tree / "etc/group"
    passwd.write_text(f"x:x:{ABSURD_NUMBER}:0::/:/bin/sh\n{'y' * 10_000}\n" + passwd.read_text())
    group.write_text(f"x:x:{ABSURD_NUMBER}:alice\n" + group.read_text())
