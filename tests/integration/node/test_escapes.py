"""Ways out of a container that Docker closes, tried in a container with the default confinement."""

import errno
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from skep.errors import SkepError
from skep.node.oci.container import ExecConfig, MountPoint
from skep.node.oci.containers import Containers
from tests.integration.node.conftest import Runner
from tests.runc_lab import Lab

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="calls have other numbers")

PYTHON = tuple(
    MountPoint(type="bind", source=path, destination=path, read_only=True)
    for path in ("/usr", "/lib", "/lib64")
)
"""The interpreter of the node, for images that have none."""

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
_TRY_CALLS = """
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


async def python(run: Runner, script: str, *arguments: str, **config: Any) -> Any:
    """What ``script`` prints, as JSON, in a container of its own."""
    text = await run.output("/usr/bin/python3", "-ISc", script, *arguments, mounts=PYTHON, **config)
    try:
        return json.loads(text)
    except ValueError:
        raise AssertionError(text) from None


async def test_calls_that_open_the_kernel_are_refused(run: Runner) -> None:
    asked = json.dumps({name: (number, arguments) for name, (number, arguments, _) in CALLS.items()})
    expected = {name: error for name, (_, _, error) in CALLS.items()}
    assert await python(run, _TRY_CALLS, asked) == expected
    # Nor are they for a user, or for root without its capabilities.
    assert await python(run, _TRY_CALLS, asked, user="1000:1000") == expected
    assert await python(run, _TRY_CALLS, asked, capability_drop=("ALL",)) == expected


_TRY_FILES = """
import json, os, stat
def tried(act):
    try:
        return act()
    except OSError as error:
        return error.errno
def write(path):
    return tried(lambda: os.close(os.open(path, os.O_WRONLY)) or "written")
def read(path):
    return tried(lambda: len(open(path, "rb").read(64)))
def device(name, kind, major, minor):
    made = tried(lambda: os.mknod(f"/tmp/{name}", kind | 0o600, os.makedev(major, minor)) or "made")
    return [made, tried(lambda: os.close(os.open(f"/tmp/{name}", os.O_RDWR)) or "opened")]
cgroups = [one.split()[1] for one in open("/proc/self/mounts") if one.split()[1].startswith("/sys/fs/cgroup/")]
print(json.dumps({
    "writes": {path: write(path) for path in (
        "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches",
        "/proc/sysrq-trigger", "/sys/kernel/uevent_seqnum", "/sys/kernel/mm/transparent_hugepage/enabled")},
    "reads": {path: read(path) for path in (
        "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/interrupts", "/proc/latency_stats",
        "/proc/sched_debug")},
    "hidden": {path: os.listdir(path) for path in ("/proc/acpi", "/proc/scsi", "/sys/firmware",
        "/sys/devices/virtual/powercap") if os.path.isdir(path)},
    "cgroups": sorted({str(tried(lambda: os.mkdir(f"{one}/x") or "made"))
        for one in cgroups or ["/sys/fs/cgroup"]}),
    "disk": device("disk", stat.S_IFBLK, 8, 0), "memory": device("memory", stat.S_IFCHR, 1, 1),
    "kmsg": device("kmsg", stat.S_IFCHR, 1, 11), "null": device("null", stat.S_IFCHR, 1, 3),
    "others": [pid for pid in os.listdir("/proc") if pid.isdigit()],
}))
"""


async def test_what_belongs_to_the_machine_is_not_read_or_written(run: Runner) -> None:
    found = await python(run, _TRY_FILES)
    assert set(found["writes"].values()) <= {EROFS, errno.ENOENT}
    assert found["writes"]["/proc/sys/kernel/core_pattern"] == EROFS
    # (Not every kernel has the key.)
    assert Path("/proc/sysrq-trigger").exists() is (found["writes"]["/proc/sysrq-trigger"] == EROFS)
    assert {size for size in found["reads"].values() if size != errno.ENOENT} == {0}
    assert all(entries == [] for entries in found["hidden"].values())
    assert found["cgroups"] == [str(EROFS)]
    # A device may be made, as in Docker, and is of no use: its cgroup does not have it.
    assert found["disk"] == found["memory"] == found["kmsg"] == ["made", EPERM]
    assert found["null"] == ["made", "opened"]
    assert found["others"] == ["1"]


_TRACE = """
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


async def test_processes_of_others_are_not_there(run: Runner, containers: Containers) -> None:
    victim = await run.start("sleep", "100")
    # A vector of no entries reads nothing, of any process.
    assert await python(run, _TRACE, str(victim.pid)) == {"attach": ESRCH, "kill": ESRCH, "read": 0} | {
        "read": "done"
    }
    assert Path(f"/proc/{victim.pid}").exists()
    await containers.remove(victim.id, force=True)


_KEYRING = """
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
session = libc.syscall(ctypes.c_long(250), 0, ctypes.c_long(-3), 0)
key = libc.syscall(ctypes.c_long(248), b"user", b"skep-test", b"secret", ctypes.c_long(6), ctypes.c_long(-3))
print(json.dumps({"session": session, "key": key, "errno": ctypes.get_errno()}))
"""


async def test_each_container_has_a_session_keyring_of_its_own(run: Runner, containers: Containers) -> None:
    """Asked without the filter, which lets nobody ask."""
    first = await python(run, _KEYRING, seccomp="unconfined")
    second = await python(run, _KEYRING, seccomp="unconfined")
    assert first["key"] > 0, first
    assert len({first["session"], second["session"]}) == 2
    import ctypes

    own = ctypes.CDLL(None).syscall(ctypes.c_long(250), 0, ctypes.c_long(-3), 0)
    assert own not in (first["session"], second["session"])


async def test_an_image_leads_nothing_of_the_node_into_its_etc(tmp_path: Path, lab: Lab, run: Runner) -> None:
    """/etc is a link out of the image: hosts and its like are mounted inside, or the container is refused."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "hosts").write_text("of the node")
    (lab.tree / "etc").rename(lab.tree / "etc-of-the-image")
    (lab.tree / "etc").symlink_to(f"../../../../../../../../../..{outside}")
    try:
        output = await run.output(
            "sh", "-c", "echo written >> /etc/hosts; echo x > /etc/new; cat /etc/hostname"
        )
    except SkepError:
        output = ""
    assert (outside / "hosts").read_text() == "of the node"
    assert [path.name for path in outside.iterdir()] == ["hosts"]
    assert "of the node" not in output


async def test_an_absurd_passwd_is_passed_over(lab: Lab, run: Runner, containers: Containers) -> None:
    """In the image, and written by the container before an exec."""
    number = "9" * 5000
    passwd, group = lab.tree / "etc/passwd", lab.tree / "etc/group"
    passwd.write_text(f"x:x:{number}:0::/:/bin/sh\n{'y' * 10_000}\n" + passwd.read_text())
    group.write_text(f"x:x:{number}:alice\n" + group.read_text())
    assert "uid=1000(alice)" in await run.output("id", user="alice")
    container = await run.start("sh", "-c", f"echo g:x:{number}:root >> /etc/group; sleep 100")
    code = await containers.execs.wait(await _exec(containers, container.id, "id"))
    assert code.exit_code == 0
    await containers.remove(container.id, force=True)


async def _exec(containers: Containers, id: str, *command: str) -> str:
    exec_id = containers.execs.create(id, ExecConfig(command=command))
    (await containers.execs.start(exec_id)).close()
    return exec_id
