"""Failures of single steps in a container's life: the other steps follow, and the record says what exists."""

import asyncio
import signal
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from sim.world.time import VirtualClock, VirtualLoop
from skep.engine.capacity import Capacity, Programs
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    NewContainer,
    NotRunning,
    PlainOptions,
    RestartPolicy,
    WaitCondition,
)
from skep.engine.runtime.bundle import Bundles, forget_environment
from skep.engine.runtime.conmon import RuntimeFailed, StartError
from skep.engine.runtime.runtime import Runtime
from skep.errors import Unavailable
from skep.linux.files import NEW_SUFFIX
from skep.model.networks.sandbox import NetworkMode, Sandbox, SandboxConfig
from skep.model.values.ids import ContainerId
from skep.model.values.times import ZERO_TIME
from tests.support.engine.stub_engine import (
    ID,
    Body,
    StubEngine,
    a_container,
    disk_full,
    on_virtual_time,
    restart_policies,
)

Run: TypeAlias = Callable[[Body], None]


@pytest.fixture
def simulated(tmp_path: Path) -> Run:
    """Run a test's body on virtual time, with an engine that has one running container."""
    return lambda body: on_virtual_time(body, tmp_path, a_container())


def test_a_failed_start_is_cleaned_up_although_its_secrets_cannot_be_forgotten(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        await stubs.end(0)
        await asyncio.sleep(1)  # everything of its run is freed
        done: list[str] = []

        async def refuse(*_: object) -> None:
            raise StartError("no such file", "start")

        async def delete(container: Container) -> None:
            done.append("delete")

        def full(*_: object) -> None:
            raise disk_full()

        stubs.steps["runtime.start"] = refuse
        stubs.steps["runtime.delete"] = delete
        stubs.steps["bundles.release"] = lambda _: done.append("release")
        stubs.steps["runtime.forget_environment"] = full
        with pytest.raises(StartError):
            await stubs.engine.start(ID, secret_env=("A=b",))
        assert done == ["delete", "release"]
        failed = stubs.engine.get(ID)
        assert (failed.process, failed.sandbox, failed.exit_code) == (None, None, 128)
        assert "no such file" in failed.error

    simulated(body)


@pytest.mark.parametrize("before", [b'{"process": {"env": ["A=b"', b'{"process": {"env": ["A=b", "C=d"]}}'])
def test_no_secret_stays_in_a_file_that_cannot_be_rewritten(tmp_path: Path, before: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(before)
    (tmp_path / f"config.json{NEW_SUFFIX}").mkdir()  # so that no new file can be written
    forget_environment(path, ("A=b",))
    assert not path.exists()


def test_a_file_without_its_secrets_replaces_the_one_with_them(tmp_path: Path) -> None:
    """A command of crun that reads the file meanwhile finds the whole of one of them."""
    path = tmp_path / "config.json"
    path.write_bytes(b'{"process": {"env": ["A=b", "C=d"]}}')
    path.chmod(0o600)
    with path.open("rb") as opened:
        forget_environment(path, ("A=b",))
        assert b"A=b" in opened.read()
    assert path.read_bytes() == b'{"process":{"env":["C=d"]}}'
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_container_that_ends_at_the_end_of_its_grace_period_was_stopped(
    simulated: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer may run before the waiter that the end has woken."""

    async def body(stubs: StubEngine) -> None:
        store = stubs.engine.store
        wait = store.wait

        async def woken_late(id: ContainerId, **_since: object) -> Container:
            monkeypatch.setattr(store, "wait", wait)
            await wait(id)
            return await asyncio.Future()

        monkeypatch.setattr(store, "wait", woken_late)
        asyncio.get_running_loop().call_later(5, stubs.runtime.end, 3)
        assert (await stubs.engine.stop(ID, 10.0)).exit_code == 3

    simulated(body)


def test_a_signal_to_a_container_that_ends_at_this_moment_watches_no_run(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        driver = stubs.engine.lifecycle
        await stubs.end(7)
        await asyncio.sleep(1)  # everything of its run is freed
        driver._store.observe(ID, state=ContainerState.RUNNING)
        killing = asyncio.create_task(stubs.engine.kill(ID))
        await asyncio.sleep(0)  # the kill has begun, and its signal follows
        driver._store.observe(ID, state=ContainerState.EXITED)
        with capture_logs() as lines:
            await killing
            await asyncio.sleep(1)
        assert [line["event"] for line in lines] == []
        assert stubs.engine.get(ID).exit_code == 7

    simulated(body)


class Refusing:
    """A step of ``Runtime.delete`` or ``Runtime.clear``: a process does not end, as often as ``times`` says."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def __call__(self, container: Container) -> None:
        if self.times:
            self.times -= 1
            raise Unavailable("the container's processes do not end")


def test_a_removal_keeps_the_record_of_a_process_that_does_not_end(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        stubs.steps["runtime.clear"] = Refusing(1)
        await stubs.end()
        stubs.steps["runtime.delete"] = Refusing(1)
        with pytest.raises(Unavailable, match="processes do not end"):
            await stubs.engine.remove(ID)
        kept = stubs.engine.get(ID)
        assert (kept.state, kept.error) == (
            ContainerState.REMOVING,
            "the container's processes do not end",
        )
        assert stubs.bundles.saved[ID] == kept
        await stubs.engine.remove(ID)
        assert not stubs.bundles.saved

    simulated(body)


@pytest.mark.parametrize("step", ["runtime.clear", "network.detach"])
@pytest.mark.parametrize("has_failed", [False, True])
def test_a_removal_frees_again_only_what_the_exit_did_not_free(
    simulated: Run, step: str, has_failed: bool
) -> None:
    async def body(stubs: StubEngine) -> None:
        freed: list[str] = []
        for name in ("runtime.clear", "runtime.delete", "network.detach"):
            stubs.steps[name] = partial(_note, freed, name, fails=has_failed and name == step)
        for _ in range(3):
            await stubs.end()
            await asyncio.sleep(1)
            await stubs.engine.start(ID)
        await stubs.end()
        await asyncio.sleep(1)
        assert freed[-6:] == ["network.detach", "runtime.clear"] * 3, "each run is freed"
        freed.clear()
        stubs.steps[step] = partial(_note, freed, step, fails=False)
        await stubs.engine.remove(ID)
        again = {"runtime.clear": "runtime.delete"}.get(step, step)
        assert freed == ([again] if has_failed else [])

    simulated(body)


async def _note(freed: list[str], name: str, *_: object, fails: bool) -> None:
    freed.append(name)
    if fails:
        raise Unavailable("it cannot be freed")


def test_the_next_process_repeats_a_removal_until_the_process_has_ended(tmp_path: Path) -> None:
    refusing = Refusing(3)

    def refuse(stubs: StubEngine) -> None:
        stubs.steps["runtime.delete"] = refusing

    async def body(stubs: StubEngine) -> None:
        assert stubs.engine.get(ID).state is ContainerState.REMOVING
        async with asyncio.timeout(60):
            await stubs.engine.wait(ID, WaitCondition.REMOVED)
        assert not stubs.bundles.saved
        assert not refusing.times

    on_virtual_time(body, tmp_path, a_container(state=ContainerState.REMOVING, process=None), before=refuse)


def test_an_ended_container_with_rm_is_removed_once_its_process_has_ended(tmp_path: Path) -> None:
    async def body(stubs: StubEngine) -> None:
        stubs.steps["runtime.clear"] = Refusing(1)
        refusing = stubs.steps["runtime.delete"] = Refusing(3)
        async with restart_policies(stubs):
            await stubs.end()
            async with asyncio.timeout(60):
                await stubs.engine.wait(ID, WaitCondition.REMOVED)
        assert not stubs.bundles.saved
        assert not refusing.times

    on_virtual_time(body, tmp_path, a_container(plain=PlainOptions(auto_remove=True)))


class FailingRunc:
    """A runtime whose runc fails, with one real process in a directory in the place of its control group."""

    def __init__(self, directory: Path) -> None:
        runc = directory / "runc"
        runc.write_text("#!/bin/sh\necho state is damaged >&2; exit 1\n")
        runc.chmod(0o755)
        cgroups = Cgroups("skep", directory / "cgroup")
        cgroups.is_v2, cgroups.own_roots = True, {"": directory / "cgroup"}
        self.state = directory / "root" / ID
        self.state.mkdir(parents=True)
        self.group = directory / "cgroup" / "skep" / "ctr" / ID
        self.group.mkdir(parents=True)
        self.runtime = Runtime(
            programs=Programs(runtimes={"runc": runc}, conmon=runc),
            root=directory / "root",
            bundles=cast("Bundles", None),
            cgroups=cgroups,
            capacity=cast("Capacity", None),
        )


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


async def test_a_process_that_runc_does_not_end_is_killed_or_said_to_be_left(
    tmp_path: Path, process: "subprocess.Popen[bytes]"
) -> None:
    rig = FailingRunc(tmp_path)
    members = rig.group / "cgroup.procs"
    members.write_text(f"{process.pid}\n")
    with pytest.raises(Unavailable, match=r"do not end: .*state is damaged"):
        await rig.runtime.delete(a_container())
    assert process.wait(10) == -signal.SIGKILL
    assert rig.state.exists(), "it is left, and so a later attempt finds it"
    members.unlink()  # the kernel does that
    await rig.runtime.delete(a_container())
    assert not rig.group.exists()
    assert not rig.state.exists()


async def test_an_unknown_container_with_processes_is_said_to_be_left(tmp_path: Path) -> None:
    rig = FailingRunc(tmp_path)
    (rig.group / "cgroup.procs").touch()
    with pytest.raises(Unavailable):
        await rig.runtime.delete_unknown(ID)


class SlowRestore:
    """An engine that waits for its networks, while its users can already send requests."""

    def __init__(self, stubs: StubEngine) -> None:
        self.stubs = stubs
        self.restored = asyncio.Event()
        self.deleted: list[ContainerId] = []
        self.namespaces: set[ContainerId] = set()
        stubs.runtime.has_all = True
        stubs.steps["network.attach"] = self.attach
        stubs.steps["network.restore"] = self.restore
        stubs.steps["runtime.delete"] = self.delete

    async def delete(self, container: Container) -> None:
        self.deleted.append(container.id)

    async def attach(self, config: SandboxConfig) -> None:
        self.namespaces.add(config.id)

    async def restore(self) -> None:
        """Free all namespaces, as the data plane does with those that no live container has."""
        await self.restored.wait()
        self.namespaces.clear()

    async def run(self) -> None:
        async with self.stubs.engine.running():
            await asyncio.Event().wait()


SlowBody: TypeAlias = Callable[[SlowRestore], Coroutine[Any, Any, None]]


def with_slow_restore(body: SlowBody, directory: Path, container: Container) -> None:
    loop = VirtualLoop()

    async def whole() -> None:
        slow = SlowRestore(StubEngine(VirtualClock(loop), directory, container))
        running = asyncio.create_task(slow.run())
        await asyncio.sleep(1)
        try:
            async with asyncio.timeout(3600):
                await body(slow)
        finally:
            running.cancel()
            await asyncio.wait([running])

    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


ENDED = a_container(state=ContainerState.EXITED, process=None, is_at_rest=True)


def test_a_start_keeps_its_namespace_while_networks_of_earlier_processes_are_restored(tmp_path: Path) -> None:
    async def body(slow: SlowRestore) -> None:
        starting = asyncio.create_task(slow.stubs.engine.start(ID))
        await asyncio.sleep(1)
        slow.restored.set()
        assert (await starting).is_running
        assert slow.namespaces == {ID}

    with_slow_restore(body, tmp_path, ENDED)


def test_the_volumes_of_a_run_that_is_adopted_later_stay_mounted(tmp_path: Path) -> None:
    async def body(stubs: StubEngine) -> None:
        await asyncio.sleep(30)
        assert stubs.engine.get(ID).is_running
        assert unmounted == [True], "once, when its volumes have their user"

    answers: list[Exception] = [OSError(12, "Cannot allocate memory") for _ in range(3)]
    unmounted: list[bool] = []

    def is_frozen(_: Container) -> bool:
        if answers:
            raise answers.pop()
        return False

    async def unmount() -> None:
        unmounted.append(not answers)

    def before(stubs: StubEngine) -> None:
        stubs.runtime.is_frozen = is_frozen  # type: ignore[method-assign]
        stubs.steps["volumes.unmount_unused"] = unmount

    on_virtual_time(body, tmp_path, a_container(), before=before)


@pytest.mark.parametrize("is_stopped_again", [True, False])
def test_a_user_who_stops_a_container_before_policies_apply_is_obeyed(
    tmp_path: Path, *, is_stopped_again: bool
) -> None:
    """With each process, ``always`` starts what was stopped before that process began."""

    async def body(stubs: StubEngine) -> None:
        if is_stopped_again:
            await stubs.engine.stop(ID)
        async with restart_policies(stubs):
            await asyncio.sleep(120)
            assert stubs.engine.get(ID).is_running is not is_stopped_again

    plain = PlainOptions(restart=RestartPolicy(name="always"), is_stopped=True)
    on_virtual_time(body, tmp_path, a_container(state=ContainerState.EXITED, process=None, plain=plain))


def test_a_start_by_its_user_before_policies_apply_ends_the_stop_before_it(tmp_path: Path) -> None:
    """A restart by its user is both, and its start may fail."""

    async def body(stubs: StubEngine) -> None:
        stubs.engine.restart_monitor.note_stop(ID)
        stubs.engine.restart_monitor.reset(ID)
        async with restart_policies(stubs):
            await asyncio.sleep(120)
            assert stubs.engine.get(ID).is_running

    plain = PlainOptions(restart=RestartPolicy(name="always"))
    on_virtual_time(body, tmp_path, a_container(state=ContainerState.EXITED, process=None, plain=plain))


def test_a_start_says_that_networks_are_not_restored(tmp_path: Path) -> None:
    async def body(slow: SlowRestore) -> None:
        with pytest.raises(Unavailable, match="are not restored yet"):
            await slow.stubs.engine.start(ID)
        assert not slow.stubs.engine.get(ID).is_running

    with_slow_restore(body, tmp_path, ENDED)


def test_a_container_on_the_host_network_starts_without_waiting_for_networks(tmp_path: Path) -> None:
    async def body(slow: SlowRestore) -> None:
        assert (await slow.stubs.engine.start(ID)).is_running

    host = replace(ENDED, plain=PlainOptions(mode=NetworkMode.HOST))
    with_slow_restore(body, tmp_path, host)


def test_a_container_that_is_created_before_the_adoption_is_not_taken_for_leftovers(tmp_path: Path) -> None:
    async def body(slow: SlowRestore) -> None:
        new = NewContainer(
            name="new",
            image="i",
            image_id="i",
            layers=(),
            config=ContainerConfig(path="sh"),
            plain=PlainOptions(),
        )
        created = await slow.stubs.engine.add(new)
        slow.restored.set()
        await asyncio.sleep(1)
        assert created.id not in slow.deleted

    with_slow_restore(body, tmp_path, ENDED)


def test_a_start_before_the_adoption_is_not_taken_for_leftovers(tmp_path: Path) -> None:
    async def body(slow: SlowRestore) -> None:
        stubs, gate = slow.stubs, asyncio.Event()
        stubs.steps["runtime.start"] = gate.wait
        starting = asyncio.create_task(stubs.engine.start(ID))
        await asyncio.sleep(1)
        slow.restored.set()
        await asyncio.sleep(1)
        before = list(slow.deleted)  # the adoption comes first
        gate.set()
        assert (await starting).is_running
        await asyncio.sleep(1)
        assert stubs.engine.get(ID).is_running
        assert slow.deleted == before

    with_slow_restore(body, tmp_path, ENDED)


def test_a_run_that_began_before_the_adoption_is_watched_once(tmp_path: Path) -> None:
    async def body(slow: SlowRestore) -> None:
        stubs = slow.stubs
        starting = asyncio.create_task(stubs.engine.start(ID))
        await asyncio.sleep(1)
        slow.restored.set()
        await starting
        await asyncio.sleep(1)
        with capture_logs() as lines:
            await stubs.end(7)
            await asyncio.sleep(1)
        assert [line["event"] for line in lines] == []
        assert stubs.engine.get(ID).exit_code == 7
        assert not stubs.bundles.adopted, "this process has opened its socket"

    with_slow_restore(body, tmp_path, ENDED)


def test_a_forced_removal_before_the_adoption_ends_a_running_container(tmp_path: Path) -> None:
    """It holds the container's lock while it waits for the end, which only the adoption can see."""

    async def body(slow: SlowRestore) -> None:
        stubs = slow.stubs
        removing = asyncio.create_task(stubs.engine.remove(ID, force=True))
        await asyncio.sleep(1)
        stubs.runtime.end(137)
        slow.restored.set()
        async with asyncio.timeout(5):
            await removing
        assert not stubs.bundles.saved

    with_slow_restore(body, tmp_path, a_container())


def test_an_adoption_that_fails_at_first_leaves_a_container_its_name(tmp_path: Path) -> None:
    found, tries = a_container(state=ContainerState.EXITED, process=None), [True, True]

    def adopted_later(_: ContainerId) -> None:
        if tries:
            tries.pop()
            raise Unavailable("no memory")

    def before(stubs: StubEngine) -> None:
        stubs.steps["bundles.is_mounted"] = adopted_later

    async def body(stubs: StubEngine) -> None:
        await asyncio.sleep(60)
        assert not tries
        assert stubs.engine.get(ID).name == found.name
        await stubs.engine.remove(ID)
        assert not stubs.engine.has(found.name)

    on_virtual_time(body, tmp_path, before=before, unreadable=found)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_signal_that_ends_a_paused_container_leaves_no_warning(simulated: Run, *, refuses: bool) -> None:
    """The kernel ends a frozen process at once, and there is nothing left to resume."""

    async def body(stubs: StubEngine) -> None:
        await stubs.engine.pause(ID)

        async def ended() -> None:
            await stubs.end(137)
            if refuses:
                raise RuntimeFailed("cannot resume a container that does not run")

        stubs.runtime.during = ended
        with capture_logs() as lines:
            assert (await stubs.engine.stop(ID, 10.0)).exit_code == 137
        assert [line["event"] for line in lines] == []

    simulated(body)


@pytest.mark.parametrize("error", [disk_full(), StartError("no such file")])
def test_a_container_with_rm_that_cannot_be_started_is_removed(tmp_path: Path, error: Exception) -> None:
    async def body(stubs: StubEngine) -> None:
        async def refuse(*_: object) -> None:
            raise error

        stubs.steps["network.attach"] = refuse
        with pytest.raises(type(error)):
            await stubs.engine.start(ID)
        assert not stubs.bundles.saved

    created = a_container(
        state=ContainerState.CREATED,
        process=None,
        started_at=ZERO_TIME,
        plain=PlainOptions(auto_remove=True),
    )
    on_virtual_time(body, tmp_path, created)


def test_a_start_says_why_it_failed_although_its_container_is_gone(tmp_path: Path) -> None:
    async def body(stubs: StubEngine) -> None:
        stubs.steps["volumes.mount"] = lambda _: asyncio.Event().wait()
        starting = asyncio.create_task(stubs.engine.start(ID))
        await asyncio.sleep(1)
        await stubs.engine.remove(ID, force=True)
        with pytest.raises(NotRunning, match="is being removed"):
            await starting

    ended = a_container(state=ContainerState.EXITED, process=None, plain=PlainOptions(auto_remove=True))
    on_virtual_time(body, tmp_path, ended)


def test_a_container_that_cannot_be_looked_at_is_adopted_later(tmp_path: Path) -> None:
    """The machine may have no memory for a process at the moment."""
    answers: list[Exception] = [OSError(12, "Cannot allocate memory"), Unavailable("slow")]

    async def status() -> None:
        if answers:
            raise answers.pop(0)

    def before(stubs: StubEngine) -> None:
        stubs.network.has_all = True
        stubs.steps["runtime.status"] = status

    async def body(stubs: StubEngine) -> None:
        assert not stubs.engine.get(ID).is_running
        assert "memory" in stubs.engine.get(ID).error
        await asyncio.sleep(10)
        adopted = stubs.engine.get(ID)
        assert (adopted.is_running, adopted.error) == (True, "")
        await stubs.end(7)
        assert stubs.engine.get(ID).exit_code == 7

    started = a_container(
        state=ContainerState.CREATED, started_at=ZERO_TIME, sandbox=Sandbox(netns="/nonexistent")
    )
    on_virtual_time(body, tmp_path, started, before=before)
