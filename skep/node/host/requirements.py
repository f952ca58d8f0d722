"""Checks that this machine can be a node, before the node starts.  Each refusal is a sentence with advice."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from skep.engine.confinement.cgroups import MOUNT_POINT, Cgroups
from skep.errors import FailedPrecondition
from skep.node.host.features import file_system_type

# Source: linux/magic.h.
OVERLAYFS_MAGIC = 0x794C7630
_TIMEOUT_S = 10.0
"""Time limit in seconds for a program to print its version."""
_NOT_ROOT = (
    "skep daemon must run as root: start it with sudo, or by its systemd unit. "
    "An ordinary user starts a node that can do less with: skep daemon --rootless"
)
_DOCKERS_OWN = ("engine-id", "overlay2", "containerd")

Version = tuple[int, ...]


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A program that Skep starts, with the oldest usable version and where to get it."""

    name: str
    oldest: Version
    remedy: str
    flag: str


RUNC = Tool(name="runc", oldest=(1, 1, 0), remedy="apt-get install runc", flag="--runc")
CRUN = Tool(name="crun", oldest=(1, 8, 0), remedy="apt-get install crun", flag="--crun")
CONMON = Tool(name="conmon", oldest=(2, 1, 0), remedy="apt-get install conmon", flag="--conmon")
NFT = Tool(name="nft", oldest=(1, 0, 0), remedy="apt-get install nftables", flag="--nft")


class Unfit(FailedPrecondition):
    """This machine cannot be a node as it is.  ``str`` returns one sentence per line."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def check(
    data_dir: Path,
    tools: Mapping[Tool, str],
    find_etcd: Callable[[], Version],
    find_container_problems: Callable[[], Iterable[str]] = tuple,
) -> Mapping[str, str]:
    """Check this machine.  Return the versions of ``tools`` (tool -> program) and of etcd, by name.

    Args:
        find_etcd: Returns etcd's version, or raises FailedPrecondition with advice.
        find_container_problems: Returns the problems with this machine's cgroups and OCI runtimes.  Empty texts do
            not count.  The default is for nodes without containers.

    Raises: Unfit: with all problems at once.
    """
    if os.geteuid() != 0:
        raise Unfit((_NOT_ROOT,))
    problems = [*_data_dir_problems(data_dir), *filter(None, find_container_problems())]
    versions: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=len(tools) + 1) as pool:
        etcd = pool.submit(find_etcd)
        outputs = pool.map(version_output, tools.values())
        for tool, output in zip(tools, outputs, strict=True):
            problem = tool_problem(tool, tools[tool], output)
            if problem:
                problems.append(problem)
            else:
                versions[tool.name] = _dotted(version_in(output or "") or ())
    try:
        versions["etcd"] = _dotted(etcd.result())
    except FailedPrecondition as error:
        problems.append(f"{error}, or name another one with --etcd-binary")
    if problems:
        raise Unfit(tuple(problems))
    return versions


def cgroup_problem(mount_point: Path = MOUNT_POINT) -> str:
    """Return why no runtime can put a container into a cgroup of this machine, or an empty text if it can.

    Source: runc, libcontainer/cgroups/fs/paths.go (on v1 the controller ``devices`` must exist).
    """
    cgroups = Cgroups("", mount_point)
    if not cgroups.is_mounted:
        return (
            f"no cgroup hierarchy is mounted at {mount_point}, so no container can start: "
            f"mount -t cgroup2 none {mount_point}"
        )
    if not cgroups.is_usable:  # a rootless node runs containers without groups
        return ""
    if not cgroups.is_v2 and "devices" not in cgroups.controllers:
        return (
            f"the cgroup hierarchy of devices is not mounted below {mount_point}, so no container can start: "
            f"mount -t cgroup -o devices none {mount_point}/devices"
        )
    root = cgroups.parent_directory("devices")
    if not os.access(root, os.W_OK):
        return f"{root} is read-only, so no container can start: mount -o remount,bind,rw {root}"
    return ""


def tool_problem(tool: Tool, program: str | None, output: str | None) -> str:
    """Return why ``program`` is unusable, or an empty text.

    ``output`` is its output for ``--version``, or None if it cannot be run.
    """
    if program is None or output is None:
        return (
            f"{program or tool.name} is missing or cannot be run: {tool.remedy}, or name it with {tool.flag}"
        )
    runtimes = re.findall(r"^(runc|crun) version", output, re.MULTILINE)
    if tool in (RUNC, CRUN) and runtimes and tool.name not in runtimes:
        return f"{program} is {runtimes[0]}: name it with --{runtimes[0]}, and {tool.name} with {tool.flag}"
    found = version_in(output)
    if found is None:
        return f"{program} does not print its version: name another {tool.name} with {tool.flag}"
    if found < tool.oldest:
        return (
            f"{tool.name} {_dotted(found)} is too old, skep needs {_dotted(tool.oldest)} or newer: "
            f"{tool.remedy} from a newer release, or name another one with {tool.flag}"
        )
    return ""


def version_in(output: str) -> Version | None:
    """Return the first part that looks like a version: ``runc version 1.1.5+ds1`` -> (1, 1, 5)."""
    match = re.search(r"\bv?(\d+)\.(\d+)(?:\.(\d+))?", output)
    return tuple(int(number) for number in match.groups() if number is not None) if match else None


def _data_dir_problems(data_dir: Path) -> Iterator[str]:
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        magic = file_system_type(data_dir)
    except OSError as error:
        yield f"the data dir {data_dir} cannot be used ({error.strerror}): name another one with --data-dir"
        return
    if magic == OVERLAYFS_MAGIC:
        yield (
            f"the data dir {data_dir} lies on an overlay file system, on which containers cannot have theirs: "
            "put it on ext4 or xfs (in a container: on a volume) with --data-dir"
        )
    if any((data_dir / name).exists() for name in _DOCKERS_OWN):
        yield (
            f"the data dir {data_dir} belongs to a Docker Engine: name another one with --data-dir, "
            "or name that engine with --engine-socket"
        )


def version_output(program: str | None) -> str | None:
    """Return the output of ``--version``, or None if the program cannot be run.  Blocks."""
    path = shutil.which(program) if program else None
    if path is None:
        return None
    try:
        done = subprocess.run(
            (path, "--version"), capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
