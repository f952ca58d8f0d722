"""What goes into a container and comes out of it: logs, attach, exec."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    ExecConfig,
    LogConfig,
    LogEntry,
    LogFilter,
    NotRunning,
    StandardStream,
)
from skep.engine.containers.execs import AlreadyStarted
from skep.engine.engine import Engine
from skep.engine.runtime.conmon import StartError
from skep.engine.runtime.processes import send_signal
from skep.errors import InvalidArgument, NotFound, Unimplemented
from skep.model.values.ids import ContainerId
from skep.model.values.times import timestamp
from tests.integration.node.conftest import Runner
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.engine.runc_lab import Lab


async def everything(attachment: Attachment) -> dict[StandardStream, bytes]:
    """All output until the process ends."""
    output = {StandardStream.STDOUT: b"", StandardStream.STDERR: b""}
    while (piece := await attachment.read()) is not None:
        output[piece[0]] += piece[1]
    attachment.close()
    return output


async def read_until(attachment: Attachment, text: bytes) -> bytes:
    output = b""
    while text not in output:
        piece = await attachment.read()
        assert piece is not None, f"it ended after {output!r}"
        output += piece[1]
    return output


async def take(entries: AsyncIterator[LogEntry], number: int) -> list[bytes]:
    found: list[bytes] = []
    async for entry in entries:
        found.append(entry.data)
        if len(found) == number:
            break
    return found


def follow(engine: Engine, container: Container) -> AsyncIterator[LogEntry]:
    return engine.logs(container.id, LogFilter(follow=True))


# --- logs --------------------------------------------------------------------------------------------------------


async def test_both_streams_are_kept_apart_and_in_order(run: Runner, engine: Engine) -> None:
    container = await run.start("sh", "-c", "echo one; sleep 0.1; echo two >&2; sleep 0.1; printf three")
    await engine.wait(container.id)
    assert await run.logs(container) == "one\ntwo\nthree\n"
    assert await run.logs(container, StandardStream.STDERR) == "two\n"


async def test_following_gives_every_line_and_ends_with_the_container(run: Runner, engine: Engine) -> None:
    container = await run.start("sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.05; done")
    lines = [entry.data async for entry in engine.logs(container.id, LogFilter(follow=True))]
    assert lines == [b"1\n", b"2\n", b"3\n", b"4\n", b"5\n"]


async def test_following_ends_when_the_container_ended_just_before_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end comes after a look at the container and before the wait for its next change: there is no next one."""
    running = Container(
        id=ContainerId("c1"), name="c", image="", image_id="", config=ContainerConfig(path="sh"),
        state=ContainerState.RUNNING, started_at=timestamp(1),
    )  # fmt: skip
    looks = iter([running, running])

    engine = memory_engine(tmp_path, Machine())
    store = engine.store
    ended = msgspec.structs.replace(running, state=ContainerState.EXITED)
    monkeypatch.setattr(store, "lookup", lambda _: next(looks, ended))
    engine.bundles.make(running)
    engine.bundles.log(running.id).write_text("1970-01-01T00:00:01Z stdout F last words\n")
    store.add(running)
    async with asyncio.timeout(5):
        lines = [entry.data async for entry in engine.logs("c1", LogFilter(follow=True))]
    assert lines == [b"last words\n"]


async def test_following_a_container_that_is_not_started_yet_waits_for_it(
    run: Runner, engine: Engine
) -> None:
    container = await run.create("sh", "-c", "echo hello")
    async with asyncio.TaskGroup() as group:
        lines = group.create_task(take(engine.logs(container.id, LogFilter(follow=True)), 1))
        await engine.start(container.id)
    assert lines.result() == [b"hello\n"]


async def test_tail_since_and_until_choose_lines(run: Runner, engine: Engine) -> None:
    container = await run.start("sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.02; done")
    await engine.wait(container.id)
    entries = [entry async for entry in engine.logs(container.id, LogFilter())]
    third = entries[2].timestamp_ns

    async def chosen(**requested: int) -> bytes:
        return b"".join([one.data async for one in engine.logs(container.id, LogFilter(**requested))])

    assert await chosen(tail=2) == b"5\n6\n"
    assert await chosen(tail=0) == b""
    assert await chosen(tail=100) == b"1\n2\n3\n4\n5\n6\n"
    assert await chosen(since_ns=third) == b"3\n4\n5\n6\n"
    assert await chosen(until_ns=third) == b"1\n2\n3\n"


async def test_a_very_long_line_comes_whole(run: Runner, engine: Engine) -> None:
    container = await run.start("sh", "-c", "yes x | head -c 100000 | tr '\\n' y; echo; echo next")
    await engine.wait(container.id)
    output = await run.logs(container)
    assert output == "xy" * 50000 + "\nnext\n"


async def test_a_thousand_followers_get_every_line_and_leave_nothing(run: Runner, engine: Engine) -> None:
    """More than there are watches for files: those without one look now and then."""
    script = "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done; read -r _; echo last"
    container = await run.start("sh", "-c", script, open_stdin=True)
    before = len(os.listdir("/proc/self/fd"))
    gone = [asyncio.create_task(take(follow(engine, container), 9)) for _ in range(20)]

    async def all_of_it() -> list[bytes]:
        return [entry.data async for entry in follow(engine, container)]

    async with asyncio.TaskGroup() as group:
        followers = [group.create_task(all_of_it()) for _ in range(1000)]
        attachment = await engine.attach(container.id)
        for one in gone:  # while they wait for further lines
            one.cancel()
        await asyncio.wait(gone)
        await attachment.write(b"\n")
    attachment.close()
    assert {tuple(one.result()) for one in followers} == {(b"1\n", b"2\n", b"3\n", b"4\n", b"5\n", b"last\n")}
    assert len(os.listdir("/proc/self/fd")) <= before + 5


async def test_bytes_of_any_kind_and_a_line_without_an_end_come_as_they_were_written(
    run: Runner, engine: Engine
) -> None:
    script = r"printf '\000\377\033[2J\r'; i=0; "
    script += r"while [ $i -lt 64 ]; do printf '%065536d' 0; i=$((i+1)); done; printf '\200'"
    container = await run.start("sh", "-c", script)
    await engine.wait(container.id)
    entries = [entry async for entry in engine.logs(container.id, LogFilter())]
    written = b"\0\xff\x1b[2J\r" + b"0" * (64 * 65536) + b"\x80"
    assert b"".join(entry.data for entry in entries) == written + b"\n"
    assert max(len(entry.data) for entry in entries) <= 16 << 10, "in pieces, as Docker's"


async def test_rotation_loses_no_line(lab: Lab, run: Runner, engine: Engine) -> None:
    """A follower and a later reader see each of 6,000 lines once, over many files."""
    config = LogConfig(max_size_bytes=60_000, max_files=50)
    container = await run.start(
        "sh",
        "-c",
        "for i in $(seq 1 6000); do echo line $i; [ $((i % 100)) = 0 ] && sleep 0.02; done",
        log=config,
    )
    expected = [f"line {number}\n".encode() for number in range(1, 6001)]
    async with asyncio.TaskGroup() as group:
        follower = group.create_task(take(engine.logs(container.id, LogFilter(follow=True)), 6000))
        while engine.get(container.id).is_running:
            engine.log_rotation.rotate(container)
            await asyncio.sleep(0.02)
    assert follower.result() == expected
    assert [entry.data async for entry in engine.logs(container.id, LogFilter())] == expected
    assert len(list((lab.paths.containers / container.id / "log").iterdir())) > 3


async def test_only_so_many_old_logs_are_kept(lab: Lab, run: Runner, engine: Engine) -> None:
    config = LogConfig(max_size_bytes=1000, max_files=2)
    container = await run.start(
        "sh", "-c", "for i in $(seq 1 500); do echo line $i; sleep 0.001; done; sleep 100", log=config
    )
    directory = lab.paths.containers / container.id / "log"
    async with aclosing(engine.logs(container.id, LogFilter(follow=True))) as entries:
        async for entry in entries:
            engine.log_rotation.rotate(container)
            if entry.data == b"line 500\n":
                break
    assert {path.name for path in directory.iterdir()} <= {"current", "current.1"}
    assert [one.data async for one in engine.logs(container.id, LogFilter(tail=1))] == [b"line 500\n"]


async def test_a_container_may_keep_no_logs(lab: Lab, run: Runner, engine: Engine) -> None:
    container = await run.start("echo", "hello", log=LogConfig(type="none"))
    await engine.wait(container.id)
    with pytest.raises(Unimplemented, match="configured logging driver does not support reading"):
        await run.logs(container)


# --- attach ------------------------------------------------------------------------------------------------------


async def test_an_attached_client_talks_to_the_process(run: Runner, engine: Engine) -> None:
    container = await run.start("sh", "-c", "read a; echo got $a; read b; echo err $b >&2", open_stdin=True)
    attachment = await engine.attach(container.id)
    await attachment.write(b"one\n")
    assert await read_until(attachment, b"\n") == b"got one\n"
    attachment.close()
    again = await engine.attach(container.id)
    await again.write(b"two\n")
    assert (await everything(again))[StandardStream.STDERR] == b"err two\n"


async def test_a_terminal_has_the_size_it_is_given(run: Runner, engine: Engine) -> None:
    command = "while :; do stty size; sleep 0.05; done"
    container = await run.start("sh", "-c", command, tty=True, open_stdin=True)
    attachment = await engine.attach(container.id)
    await engine.resize(container.id, 33, 77)
    assert b"33 77" in await read_until(attachment, b"33 77")
    attachment.close()


async def test_a_terminal_that_is_resized_a_thousand_times_has_its_last_size(
    run: Runner, engine: Engine
) -> None:
    container = await run.start("sh", "-c", "read -r _; stty size", tty=True, open_stdin=True)
    attachment = await engine.attach(container.id)
    monitor = engine.get(container.id).monitor
    assert monitor is not None
    send_signal(monitor, signal.SIGSTOP)  # as on a busy machine: it does nothing in between
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for number in range(999):
            group.create_task(engine.resize(container.id, 20 + number % 50, 80))
    await engine.resize(container.id, 44, 99)
    send_signal(monitor, signal.SIGCONT)
    await attachment.write(b"\n")
    assert b"44 99" in await read_until(attachment, b"44 99")
    attachment.close()
    assert (await engine.wait(container.id)).exit_code == 0


async def test_one_cannot_attach_to_what_does_not_run(run: Runner, engine: Engine) -> None:
    container = await run.create("true")
    with pytest.raises(NotRunning):
        await engine.attach(container.id)


# --- exec --------------------------------------------------------------------------------------------------------


async def test_an_exec_has_its_own_streams_and_exit_code(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100", env=("FROM=container",))
    requested = ExecConfig(
        command=("sh", "-c", "cat; echo $FROM $EXTRA; pwd; echo err >&2; exit 5"),
        env=("EXTRA=exec",),
        working_dir="/tmp",
        attach_stdin=True,
    )
    id = engine.execs.create(container.id, requested)
    assert engine.execs.get(id).exit_code is None
    attachment = await engine.execs.start(id)
    await attachment.write(b"input\n")
    attachment.close_input()
    output = await everything(attachment)
    assert output == {
        StandardStream.STDOUT: b"input\ncontainer exec\n/tmp\n",
        StandardStream.STDERR: b"err\n",
    }
    ended = await engine.execs.wait(id)
    assert (ended.running, ended.exit_code) == (False, 5)


@pytest.mark.parametrize("tty", [True, False])
async def test_a_terminals_input_outlives_its_first_client(run: Runner, engine: Engine, *, tty: bool) -> None:
    """``docker run -it``, the keys that detach, ``docker attach``; without a terminal its input ends."""
    container = await run.start("cat", tty=tty, open_stdin=True, stdin_once=True)
    (await engine.attach(container.id)).close()
    if not tty:
        assert (await engine.wait(container.id)).exit_code == 0
        return
    one, other = await engine.attach(container.id), await engine.attach(container.id)
    await one.write(b"hello\n")
    for attachment in (one, other):
        await read_until(attachment, b"hello\r\nhello\r\n")
        attachment.close()


async def test_an_exec_with_a_terminal(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    id = engine.execs.create(container.id, ExecConfig(command=("sh",), tty=True, attach_stdin=True))
    attachment = await engine.execs.start(id)
    engine.execs.resize(id, 41, 99)
    await attachment.write(b"stty size; exit 6\n")
    assert b"41 99\r\n" in (await everything(attachment))[StandardStream.STDOUT]
    assert (await engine.execs.wait(id)).exit_code == 6


async def test_an_exec_has_the_last_size_that_was_asked_for_while_it_started(
    run: Runner, engine: Engine
) -> None:
    container = await run.start("sleep", "100")
    command = ("sh", "-c", "read -r _; stty size")
    id = engine.execs.create(container.id, ExecConfig(command=command, tty=True, attach_stdin=True))
    starting = asyncio.create_task(engine.execs.start(id))
    await asyncio.sleep(0)  # it has begun
    for rows in range(20, 60):
        engine.execs.resize(id, rows, 101)
    attachment = await starting
    await attachment.write(b"\n")
    assert b"59 101\r\n" in (await everything(attachment))[StandardStream.STDOUT]


async def test_an_exec_runs_as_the_user_it_names(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    id = engine.execs.create(container.id, ExecConfig(command=("id",), user="alice"))
    output = await everything(await engine.execs.start(id))
    assert output[StandardStream.STDOUT] == b"uid=1000(alice) gid=1001(alice) groups=50(staff),1001(alice)\n"
    id = engine.execs.create(container.id, ExecConfig(command=("id",), user="nobody-knows"))
    with pytest.raises(
        InvalidArgument, match="unable to find user nobody-knows: no matching entries in passwd"
    ):
        await engine.execs.start(id)


async def test_an_exec_that_cannot_start_keeps_dockers_exit_code(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    id = engine.execs.create(container.id, ExecConfig(command=("nosuch",)))
    with pytest.raises(StartError, match="executable file not found in \\$PATH"):
        await engine.execs.start(id)
    assert engine.execs.get(id).exit_code == 127


async def test_a_detached_exec_goes_on_alone(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    id = engine.execs.create(container.id, ExecConfig(command=("sh", "-c", "sleep 0.2; touch /tmp/done")))
    (await engine.execs.start(id)).close()
    assert engine.execs.get(id).running
    assert (await engine.execs.wait(id)).exit_code == 0


async def test_execs_end_with_their_container(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    id = engine.execs.create(container.id, ExecConfig(command=("sleep", "100")))
    attachment = await engine.execs.start(id)
    await engine.kill(container.id)
    assert await attachment.read() is None
    attachment.close()
    assert (await engine.execs.wait(id)).exit_code == 137


async def test_an_exec_starts_once_and_needs_a_running_container(run: Runner, engine: Engine) -> None:
    container = await run.create("sleep", "100")
    with pytest.raises(NotRunning):
        engine.execs.create(container.id, ExecConfig(command=("true",)))
    await engine.start(container.id)
    id = engine.execs.create(container.id, ExecConfig(command=("true",)))
    (await engine.execs.start(id)).close()
    with pytest.raises(AlreadyStarted, match="is already running"):
        await engine.execs.start(id)
    await engine.execs.wait(id)
    with pytest.raises(AlreadyStarted, match="has already run"):
        await engine.execs.start(id)
    await engine.remove(container.id, force=True)
    with pytest.raises(NotFound, match="No such exec instance"):
        engine.execs.get(id)


async def test_top_shows_the_containers_processes_only(
    run: Runner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their commands whole, however narrow the terminal is that the daemon was started from."""
    monkeypatch.setenv("COLUMNS", "40")
    container = await run.start("sh", "-c", "/bin/sleep 77 & wait")
    commands: list[str] = []
    for _ in range(100):
        listed = await engine.top(container.id)
        commands = sorted(row[-1] for row in listed.processes)
        if "/bin/sleep 77" in commands:
            break
        await asyncio.sleep(0.02)  # the second is still a copy of the first, or not there
    assert commands == ["/bin/sleep 77", "sh -c /bin/sleep 77 & wait"]
    assert "PID" in listed.titles
    with pytest.raises(InvalidArgument, match="Couldn't find PID field"):
        await engine.top(container.id, "-o comm")
