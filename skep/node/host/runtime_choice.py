"""Chooses the OCI runtime of this node's containers: crun on cgroup v2 where it can be used, otherwise runc.

crun needs less processor time for a start than runc (decision 185), but refuses cgroup v1 and the hybrid hierarchy, and
must be able to raise its limit of locked memory.
"""

import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from skep.engine.confinement import capabilities
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.runtime import runtime_flaws
from skep.node.host.requirements import CRUN, RUNC, Tool, tool_problem, version_in, version_output

AUTOMATIC = "auto"
"""Value of ``--runtime`` that leaves the choice to Skep."""
_TOOLS = (CRUN, RUNC)


class InstalledRuntime(msgspec.Struct, frozen=True, kw_only=True):
    """A runtime as it was found on this machine.  ``problem`` says why it cannot be used, or is empty."""

    program: str
    version: str = ""
    problem: str = ""
    warning: str = ""
    """Sentence about its known container escapes, or empty."""


class RuntimeChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The runtimes that containers of this node may request, and the default for containers that request none."""

    usable: Mapping[str, InstalledRuntime] = {}
    default: str = "runc"
    reason: str = ""
    problem: str = ""
    """Why this node cannot start containers, with advice, or empty."""

    @property
    def programs(self) -> Mapping[str, str]:
        """Programs (names or paths) of the usable runtimes."""
        return {name: one.program for name, one in self.usable.items()}

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the usable runtimes."""
        return {name: one.version for name, one in self.usable.items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for ``docker info`` about the default runtime."""
        found = self.usable.get(self.default)
        return (found.warning,) if found is not None and found.warning else ()


def choose(installed: Mapping[str, InstalledRuntime], *, wanted: str, crun_problem: str) -> RuntimeChoice:
    """Return the runtimes that this node can use, and the default.

    Args:
        installed: ``runc`` and ``crun``, as ``look_up`` has found them.
        wanted: ``runc``, ``crun``, or ``auto``.
        crun_problem: Why this machine cannot run crun (``crun_problem``).
    """
    problems = {name: one.problem for name, one in installed.items()}
    problems["crun"] = problems["crun"] or crun_problem
    usable = {name: one for name, one in installed.items() if not problems[name]}
    if wanted != AUTOMATIC:
        return RuntimeChoice(
            usable=usable, default=wanted, reason="set by --runtime", problem=problems[wanted]
        )
    if "crun" not in usable:
        return RuntimeChoice(
            usable=usable, reason=problems["crun"].partition(":")[0], problem=problems["runc"]
        )
    if "runc" in usable and usable["crun"].warning and not usable["runc"].warning:
        return RuntimeChoice(usable=usable, reason=usable["crun"].warning.partition(":")[0])
    return RuntimeChoice(usable=usable, default="crun", reason="crun needs less processor time than runc")


def crun_problem(*, is_cgroup_v2: bool, may_raise_limits: bool) -> str:
    """Return why crun cannot run containers on this machine, with advice, or an empty text.

    Source: crun, src/libcrun/cgroup-utils.c (libcrun_get_cgroup_mode), src/libcrun/ebpf.c (libcrun_ebpf_load).
    """
    if not is_cgroup_v2:
        return (
            "crun does not support this machine's cgroup hierarchy, which is v1 or hybrid: "
            "set --runtime runc, or boot with systemd.unified_cgroup_hierarchy=1"
        )
    if not may_raise_limits:
        return (
            "crun cannot raise its limit of locked memory (RLIMIT_MEMLOCK): "
            "set --runtime runc, or give skep the capability CAP_SYS_RESOURCE"
        )
    return ""


def find_crun_problem() -> str:
    """Return the problem of crun on this machine (see ``crun_problem``)."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return crun_problem(
        is_cgroup_v2=Cgroups("").is_v2,
        may_raise_limits=hard == resource.RLIM_INFINITY or "CAP_SYS_RESOURCE" in capabilities.bounding_set(),
    )


def look_up(programs: Mapping[str, str]) -> Mapping[str, InstalledRuntime]:
    """Look up the runtimes, whose ``programs`` are names or paths by runtime.  Blocks."""
    return {tool.name: _look_up(tool, programs[tool.name]) for tool in _TOOLS}


def _look_up(tool: Tool, program: str) -> InstalledRuntime:
    output = version_output(program)
    if problem := tool_problem(tool, program, output):
        return InstalledRuntime(program=program, problem=problem)
    output = output or ""
    changelog = runtime_flaws.changelog_of(tool.name, Path(shutil.which(program) or program))
    return InstalledRuntime(
        program=program,
        version=".".join(map(str, version_in(output) or ())),
        warning=runtime_flaws.warning(tool.name, output, changelog),
    )
