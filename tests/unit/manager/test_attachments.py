"""Which plain containers a manager attaches to a network: labels and shares count for every request."""

import pytest

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied, ResourceExhausted
from skep.manager.nodes.attachment_service import AttachmentRequest, attach
from skep.model.networks.attaching import ATTACH_LABEL, SHARE
from skep.model.task import Task
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, an_overlay

NOW = Timestamp("2026-01-02T03:04:05Z")
SMALL = "10.0.1.0/29"
ADDRESSES = 8
"""In the small subnet."""


@pytest.fixture
async def store() -> MemoryStore:
    """Two nodes, a network for one of them, and a small one for both."""
    store = MemoryStore(SystemClock())
    inner = an_overlay("inner", attachable=True, labels={ATTACH_LABEL: "node.labels.zone==inner"})
    small = an_overlay("small", subnet=SMALL, attachable=True)
    objects = a_node("n1", labels={"zone": "inner"}), a_node("n2", labels={"zone": "outer"}), inner, small
    await store.update(lambda tx: [tx.put(one) for one in objects])
    return store


def request(number: int, node: str, network: str) -> AttachmentRequest:
    return AttachmentRequest(
        task_id=TaskId(f"t{number}"), node_id=NodeId(node), container_id=f"c{number}", network=network
    )


async def test_a_node_that_the_label_does_not_name_is_refused(store: MemoryStore) -> None:
    with pytest.raises(PermissionDenied, match=r"node\.labels\.zone==inner, which this node does not meet"):
        await store.update(attach, request(1, "n2", "inner"), NOW)
    assert (await store.update(attach, request(1, "n1", "inner"), NOW)).node_id == "n1"


async def test_one_node_gets_half_of_the_addresses_and_another_one_the_next(store: MemoryStore) -> None:
    for number in range(ADDRESSES // SHARE):
        await store.update(attach, request(number, "n1", "small"), NOW)
    with pytest.raises(ResourceExhausted, match="half of the 8 addresses of network small"):
        await store.update(attach, request(8, "n1", "small"), NOW)
    await store.update(attach, request(8, "n2", "small"), NOW)


async def test_places_on_other_networks_are_not_of_the_share(store: MemoryStore) -> None:
    for number in range(ADDRESSES):
        await store.update(attach, request(number, "n1", "inner"), NOW)
    await store.update(attach, request(ADDRESSES, "n1", "small"), NOW)
    assert len(store.view().find(Task, node_id="n1")) == ADDRESSES + 1
