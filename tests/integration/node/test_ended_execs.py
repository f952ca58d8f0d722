"""An exec that is given up while it starts leaves no process in its container."""

import asyncio
from pathlib import Path

import pytest

from skep.engine.containers.container import ExecConfig
from skep.engine.engine import Engine
from skep.engine.runtime import conmon
from skep.errors import Unavailable
from tests.integration.node.conftest import Runner, eventually

DELAYS_MS = range(0, 30, 3)
"""From the moment when runc's process has come to the container's cgroup; a start takes some 30 ms from there."""


def freeze(group: Path, *, is_frozen: bool) -> None:
    """Not by runc, which starts no exec in a container that is paused."""
    if (group / "freezer.state").exists():
        (group / "freezer.state").write_text("FROZEN" if is_frozen else "THAWED")
    else:
        (group / "cgroup.freeze").write_text("1" if is_frozen else "0")


async def test_an_exec_that_gets_no_processor_time_while_it_starts_does_not_run_later(
    run: Runner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await run.start("sleep", "1000")
    group = engine.cgroups.directory(container, "freezer")
    assert group is not None
    monkeypatch.setattr(conmon, "DEADLINE_S", 0.5)
    given_up = 0
    for delay_ms in DELAYS_MS:
        exec_id = engine.execs.create(container.id, ExecConfig(command=("sleep", "1000")))
        starting = asyncio.create_task(engine.execs.start(exec_id))
        while len((group / "cgroup.procs").read_text().split()) < 2 and not starting.done():  # noqa: ASYNC110
            await asyncio.sleep(0)  # there is no event
        await asyncio.sleep(delay_ms / 1000)
        freeze(group, is_frozen=True)
        await asyncio.wait([starting])
        freeze(group, is_frozen=False)
        try:
            starting.result().close()
            engine.execs.kill(exec_id)
        except Unavailable:
            given_up += 1
        await asyncio.sleep(0.2)  # a process that is left would go on now
        await eventually(
            lambda: (group / "cgroup.procs").read_text().split() == [str(container.pid)],
            f"gone after {delay_ms} ms: {starting}",
        )
    assert given_up, "some were frozen in time"
