"""A container from its start to its end, on real runc and conmon."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from skep.engine.containers.container import ContainerState, NotRunning, StillRunning, WaitCondition
from skep.engine.engine import Engine
from skep.engine.runtime.conmon import StartError
from skep.engine.runtime.processes import is_alive
from skep.errors import AlreadyExists, InvalidArgument, NotFound
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.runc_lab import Lab

POLITE = ("sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done")
DEAF = ("sh", "-c", "trap '' TERM; while :; do sleep 0.05; done")


@pytest.mark.parametrize("code", [0, 7, 255])
async def test_the_exit_code_is_the_commands(run: Runner, engine: Engine, code: int) -> None:
    container = await run.start("sh", "-c", f"exit {code}")
    ended = await engine.wait(container.id)
    assert (ended.state, ended.exit_code, ended.pid) == (ContainerState.EXITED, code, 0)
    assert ended.finished_at > ended.started_at > ended.created_at


async def test_a_container_killed_from_outside_ends_with_137(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    os.kill(container.pid, signal.SIGKILL)
    assert (await engine.wait(container.id)).exit_code == 137


async def test_the_stop_signal_comes_first_and_the_grace_period_is_given(run: Runner, engine: Engine) -> None:
    polite = await run.start(*POLITE, stop_grace_ns=30 * 10**9)
    await eventually_trapped(polite.pid, signal.SIGTERM)
    assert (await engine.stop(polite.id)).exit_code == 3
    deaf = await run.start(*DEAF)
    await eventually_ignored(deaf.pid, signal.SIGTERM)
    began = asyncio.get_running_loop().time()
    assert (await engine.stop(deaf.id, 0.5)).exit_code == 137
    assert asyncio.get_running_loop().time() - began >= 0.5


async def test_another_stop_signal_is_used(run: Runner, engine: Engine) -> None:
    command = ("sh", "-c", "trap 'exit 5' USR1; while :; do sleep 0.05; done")
    container = await run.start(*command, stop_signal="SIGUSR1")
    await eventually_trapped(container.pid, signal.SIGUSR1)
    assert (await engine.stop(container.id)).exit_code == 5


async def test_a_process_that_needs_too_much_memory_is_reported_as_such(run: Runner, engine: Engine) -> None:
    container = await run.start("sh", "-c", "exec tail -c 200m /dev/zero", memory_bytes=16 << 20)
    ended = await engine.wait(container.id)
    assert (ended.exit_code, ended.oom_killed) == (137, True)


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("nosuch", 127, 'exec: "nosuch": executable file not found in $PATH'),
        ("/etc/passwd", 126, 'exec: "/etc/passwd": permission denied'),
    ],
)
async def test_a_command_that_cannot_run_has_dockers_exit_code(
    run: Runner, engine: Engine, command: str, code: int, words: str
) -> None:
    container = await run.create(command)
    with pytest.raises(StartError, match="OCI runtime create failed") as refused:
        await engine.start(container.id)
    assert words in str(refused.value)
    assert engine.get(container.id).exit_code == code
    assert refused.value.exit_code == code


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.04])
async def test_a_start_that_is_cancelled_is_finished_first(
    lab: Lab, run: Runner, engine: Engine, after_s: float
) -> None:
    """Otherwise its monitor would create an untracked container."""
    container = await run.create("sleep", "100")
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(engine.start(container.id))
        await asyncio.sleep(after_s)
        starting.cancel()
        await asyncio.wait([starting])
    # On a slow machine it may not have begun.
    present = engine.get(container.id)
    assert present.is_running or not present.was_started
    await engine.remove(container.id, force=True)
    assert lab.remains() == []


async def test_wait_returns_for_each_condition(run: Runner, engine: Engine) -> None:
    container = await run.create("sleep", "0.2")
    async with asyncio.TaskGroup() as group:
        next_exit = group.create_task(engine.wait(container.id, WaitCondition.NEXT_EXIT))
        removed = group.create_task(engine.wait(container.id, WaitCondition.REMOVED))
        assert (await engine.wait(container.id)).state is ContainerState.CREATED
        await engine.start(container.id)
        assert (await next_exit).state is ContainerState.EXITED
        assert not removed.done()
        await engine.remove(container.id)
        assert (await removed).id == container.id


async def test_a_stopped_container_can_be_started_again(run: Runner, engine: Engine) -> None:
    container = await run.start("sh", "-c", "echo once; exit 4")
    await engine.wait(container.id)
    again = await engine.start(container.id)
    assert again.started_at > container.started_at
    assert (await engine.wait(container.id)).exit_code == 4
    assert await run.logs(container) == "once\nonce\n"


async def test_a_container_is_found_by_id_name_and_prefix(run: Runner, engine: Engine) -> None:
    container = await run.create("true")
    for word in (container.id, container.id[:12], container.name, f"/{container.name}"):
        assert engine.get(word).id == container.id
    with pytest.raises(NotFound, match="No such container: nosuch"):
        engine.get("nosuch")


async def test_two_containers_cannot_have_one_name(run: Runner, engine: Engine) -> None:
    await run.create("true", name="web")
    with pytest.raises(AlreadyExists, match='The container name "/web" is already in use by container'):
        await run.create("true", name="web")


async def test_a_running_container_is_removed_only_by_force(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    with pytest.raises(StillRunning):
        await engine.remove(container.id)
    await engine.remove(container.id, force=True)
    with pytest.raises(NotFound):
        engine.get(container.id)


async def test_signals_go_to_running_containers_only(run: Runner, engine: Engine) -> None:
    container = await run.create("sleep", "100")
    with pytest.raises(NotRunning, match="is not running"):
        await engine.kill(container.id)
    await engine.start(container.id)
    with pytest.raises(InvalidArgument, match="Invalid signal: NONSENSE"):
        await engine.kill(container.id, "NONSENSE")
    await engine.kill(container.id, "9")
    assert (await engine.wait(container.id)).exit_code == 137


async def test_a_paused_container_stands_still_and_can_be_killed(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    await engine.pause(container.id)
    assert engine.get(container.id).state is ContainerState.PAUSED
    await engine.unpause(container.id)
    await engine.pause(container.id)
    await engine.kill(container.id)
    assert (await engine.wait(container.id)).exit_code == 137


async def test_events_are_in_the_order_of_the_changes(run: Runner, engine: Engine) -> None:
    with engine.events.subscribed() as events:
        container = await run.start("sleep", "100", labels={"a": "b"})
        await engine.kill(container.id, "KILL")
        await engine.wait(container.id)
        await engine.remove(container.id)
        reported = []
        async for event in events:
            reported.append(
                (event.action, event.attributes.get("signal") or event.attributes.get("exitCode"))
            )
            if event.action == "destroy":
                break
    assert reported == [
        ("create", None), ("connect", None), ("start", None),
        ("kill", "9"), ("die", "137"), ("disconnect", None), ("destroy", None),
    ]  # fmt: skip
    joined = next(one for one in engine.events.recent(0) if one.action == "connect")
    assert (joined.type, joined.attributes["name"], joined.attributes["container"]) == (
        "network",
        "bridge",
        container.id,
    )
    assert event.attributes["name"] == container.name
    assert event.attributes["a"] == "b"


async def test_nothing_is_left_after_removal(lab: Lab, run: Runner, engine: Engine) -> None:
    made = [await run.start(*POLITE) for _ in range(3)]
    process, monitor = made[0].process, made[0].monitor
    assert process is not None
    assert monitor is not None
    await run.create("true")
    for container in engine.list():
        await engine.remove(container.id, force=True)
    assert lab.remains() == []
    assert not is_alive(process)
    assert not is_alive(monitor)
    for _ in range(100):  # the kernel frees a namespace with its links a moment later
        links = await lab.in_home("ip", "-o", "link")
        if ": vs" not in links:
            break
        await asyncio.sleep(0.05)
    assert ": vs" not in links


async def eventually_trapped(pid: int, number: int) -> None:
    """Until the process has a handler for the signal."""
    await eventually(lambda: _has_signal(pid, "SigCgt:", number), f"signal {number} is trapped")


async def eventually_ignored(pid: int, number: int) -> None:
    """Until the process ignores the signal."""
    await eventually(lambda: _has_signal(pid, "SigIgn:", number), f"signal {number} is ignored")


def _has_signal(pid: int, field: str, number: int) -> bool:
    """Of the command itself: for a moment after its start the process still is runc's."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    if "runc" in lines[0]:
        return False
    bits = next(line.split()[1] for line in lines if line.startswith(field))
    return bool(int(bits, 16) >> (number - 1) & 1)
