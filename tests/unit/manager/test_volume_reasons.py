"""Why a task's volume is not published on its node, where users look: the task's error."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control.tasks import known_status
from skep.manager.diagnosis.explanations import explain_task
from skep.manager.dispatcher.statuses import StatusReport, record_status
from skep.model.node import SessionOwner
from skep.model.task import Task, TaskState, TaskStatus, VolumeAttachment
from skep.model.values.ids import NodeId, SessionId, TaskId, VolumeId
from skep.model.volume import NOT_PUBLISHED, PublishState, PublishStatus, Volume, VolumeInfo, VolumeSpec
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task

WORDS = "driver d: ControllerPublishVolume: the disk is on fire"
REASON = f"cluster volume data: {WORDS}"
N1, SESSION = NodeId("n1"), SessionId("s")


async def stored(state: PublishState, message: str) -> tuple[MemoryStore, Task]:
    """A task that prepares on n1, with a volume there."""
    store = MemoryStore(SystemClock())
    session = SessionOwner(manager_id=NodeId("m1"), session_id=SESSION)
    statuses = (PublishStatus(node_id=N1, state=state, message=message),)
    volume = Volume(
        id=VolumeId("v1"),
        spec=VolumeSpec(name="data"),
        info=VolumeInfo(volume_id="d1"),
        publish_status=statuses,
    )
    task = replace(
        a_task("t1", node="n1", service=a_service(), state=TaskState.PREPARING),
        volumes=(VolumeAttachment(id="v1", source="data", target="/d"),),
    )
    objects = (a_service(), replace(a_node("n1"), session=session), volume, task)
    await store.update(lambda tx: [tx.put(one) for one in objects])
    return store, store.view().get(Task, "t1")


@pytest.mark.parametrize(
    ("state", "message", "shown"),
    [
        (PublishState.PENDING, WORDS, REASON),
        (
            PublishState.PENDING,
            "node \x1b[2J has no driver d",
            "cluster volume data: node [2J has no driver d",
        ),
        (PublishState.PENDING, "", ""),
        (PublishState.PUBLISHED, "of before", ""),
    ],
)
async def test_a_task_that_waits_for_its_volume_shows_what_the_driver_said(
    state: PublishState, message: str, shown: str
) -> None:
    store, task = await stored(state, message)
    status = known_status(store.view(), task)
    assert (status.err, status.state) == (shown, TaskState.PREPARING)
    assert explain_task(replace(task, status=status), a_node("n1")).summary.endswith(shown)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"data was not mounted in time: {NOT_PUBLISHED}", f"data was not mounted in time: {NOT_PUBLISHED}: {REASON}"),
        ("No such image: x", "No such image: x"),
    ],
)  # fmt: skip
async def test_a_task_that_failed_for_want_of_its_volume_keeps_what_the_driver_said(
    said: str, kept: str
) -> None:
    store, _ = await stored(PublishState.PENDING, WORDS)
    status = TaskStatus(state=TaskState.FAILED, err=said)
    report = StatusReport(node_id=N1, session_id=SESSION, task_id=TaskId("t1"), status=status)
    assert await store.update(record_status, report)
    assert store.view().get(Task, "t1").status.err == kept
