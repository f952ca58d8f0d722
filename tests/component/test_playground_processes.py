"""Ending the processes of a playground's node, which the kernel has in control groups."""

import asyncio
import os
import signal

import pytest

from skep.playground import cgroups, processes

pytestmark = pytest.mark.needs("root")


async def test_processes_of_a_paused_container_end_with_their_node() -> None:
    playground = f"paused{os.getpid()}"
    groups = {path.parents[2].name: path for path in cgroups.make(playground, "m1")}
    group = groups.get("freezer") or next(iter(groups.values()))
    sleeper = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        (group / "cgroup.procs").write_text(str(sleeper.pid))
        if (group / "freezer.state").exists():
            (group / "freezer.state").write_text("FROZEN")
        else:
            (group / "cgroup.freeze").write_text("1")
        await processes.kill_all(playground, "m1")
        assert await sleeper.wait() == -signal.SIGKILL
    finally:
        cgroups.thaw(playground, "m1")
        await cgroups.remove(playground, "m1")
