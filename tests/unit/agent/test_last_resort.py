"""Tasks of services that want it stop without a manager, whether or not there is a node process to do it."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.agent.session.last_seen import LastSeenFile
from skep.agent.tasks.last_resort import AWAKE_S, LATER_S, RESCAN_S, LastResort, is_locked
from skep.agent.tasks.task_files import RememberedTask, TaskFiles
from skep.aio.clock import SystemClock
from skep.engine.containers import records
from skep.engine.containers.container import ContainerState, ProcessName
from skep.engine.runtime.processes import find
from skep.linux.detached import held_lock
from skep.linux.processes import boot_id
from skep.model.options.labels import LABEL_TASK_ID, ON_DISCONNECT, ON_DISCONNECT_DELAY
from skep.model.task import TaskStatus
from skep.model.values.ids import ContainerId
from skep.paths import Paths
from tests.unit.agent.test_worker import assigned
from tests.unit.engine.test_records import a_container

DELAY_S, GRACE_S = 30.0, 10.0


class Watch(SystemClock):
    """Stands where it is put."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def since_boot(self) -> float:
        return self.now


class Machine:
    """A node's files, with containers that are processes of this test."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths(root / "data", root / "run")
        self.clock = Watch()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.sent: list[tuple[ProcessName, int]] = []
        for directory in (self.paths.tasks, self.paths.run):
            directory.mkdir(parents=True)
        self.resort = LastResort(self.paths, self.clock)

    def received(self) -> None:
        LastSeenFile(self.paths.last_seen, self.clock.since_boot, boot_id()).record(0.0)

    def task(self, id: str, command: str = "exec sleep 1000", **labels: str) -> None:
        process = self.processes[id] = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE)
        if "echo" in command:
            assert process.stdout is not None
            process.stdout.readline()
        task = replace(
            assigned(id), service_labels={key.replace("_", "."): value for key, value in labels.items()}
        )
        TaskFiles(self.paths.tasks).write({task.task.id: RememberedTask(task, TaskStatus())})
        container = a_container(name=id)
        container = replace(
            container,
            id=ContainerId(id),
            labels={LABEL_TASK_ID: id},
            process=find(process.pid),
            state=ContainerState.RUNNING,
            config=replace(container.config, stop_signal="", stop_grace_ns=round(GRACE_S * 1e9)),
        )
        (self.paths.containers / id).mkdir(parents=True)
        records.write(self.paths.containers / id / records.NAME, container)

    def look(self, silence_s: float) -> None:
        self.clock.now = 1000.0 + silence_s
        self.resort.check()

    def runs(self, id: str) -> bool:
        return self.processes[id].poll() is None


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    machine.received()
    yield machine
    for process in machine.processes.values():
        process.kill()
        process.communicate()


STOP = {ON_DISCONNECT: "stop", ON_DISCONNECT_DELAY: f"{DELAY_S:g}s"}


def test_without_a_node_process_a_task_stops_at_its_time_and_no_other_does(machine: Machine) -> None:
    machine.task("stops", **STOP)
    machine.task("keeps", **{ON_DISCONNECT: "keep"})
    machine.task("usual")
    machine.look(AWAKE_S - 0.1)
    machine.look(DELAY_S - 0.1)
    assert machine.runs("stops")
    machine.look(DELAY_S)
    assert machine.processes["stops"].wait(30) == -signal.SIGTERM
    machine.look(10 * DELAY_S)
    assert machine.runs("keeps")
    assert machine.runs("usual")


def test_one_that_does_not_obey_is_killed_after_its_grace(machine: Machine) -> None:
    machine.task("stubborn", "trap '' TERM; echo ready; while :; do sleep 0.1; done", **STOP)
    machine.look(DELAY_S)
    machine.look(DELAY_S + GRACE_S + LATER_S - 0.1)
    assert machine.runs("stubborn")
    machine.look(DELAY_S + GRACE_S + LATER_S)
    assert machine.processes["stubborn"].wait(30) == -signal.SIGKILL


def test_a_node_process_that_lives_does_it_itself(machine: Machine) -> None:
    machine.task("stops", **STOP)
    machine.paths.data_lock.touch()
    assert not is_locked(machine.paths.data_lock)
    with held_lock(machine.paths.data_lock):
        assert is_locked(machine.paths.data_lock)
        machine.look(DELAY_S + 1)
        assert machine.runs("stops")
        machine.look(DELAY_S + GRACE_S + LATER_S)
        assert machine.processes["stops"].wait(30) == -signal.SIGKILL


def test_containers_stay_when_a_manager_is_reached_again(machine: Machine) -> None:
    machine.task("stops", **STOP)
    machine.look(DELAY_S - 1)
    machine.clock.now = 1000.0 + DELAY_S - 1
    machine.received()
    machine.look(DELAY_S + RESCAN_S)
    assert machine.runs("stops")


@pytest.mark.parametrize("content", [None, b"{", b'{"boot_id": "another", "at": 0}'])
def test_without_a_readable_last_contact_nothing_is_stopped(machine: Machine, content: bytes | None) -> None:
    machine.task("stops", **STOP)
    machine.paths.last_seen.unlink()
    if content is not None:
        machine.paths.last_seen.write_bytes(content)
    machine.look(100 * DELAY_S)
    assert machine.runs("stops")
