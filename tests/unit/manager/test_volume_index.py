"""A node's assignments look at the volumes that concern it, however many the cluster has."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.dispatcher.assignments import difference, everything
from skep.manager.services.volume_index import VolumeIndex
from skep.model.values.ids import NodeId, VolumeId
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeInfo, VolumeSpec
from skep.store.interface import View
from skep.store.memory import MemoryStore

N1, N2, N3 = NodeId("n1"), NodeId("n2"), NodeId("n3")


def a_volume(*nodes: NodeId, state: PublishState = PublishState.PUBLISHED, message: str = "") -> Volume:
    statuses = tuple(PublishStatus(node_id=id, state=state, message=message) for id in nodes)
    spec = VolumeSpec(name="data")
    return Volume(id=VolumeId("v1"), spec=spec, info=VolumeInfo(volume_id="d1"), publish_status=statuses)


def test_a_change_concerns_the_nodes_whose_status_it_changes() -> None:
    index = VolumeIndex()
    one, both = a_volume(N1), a_volume(N1, N2)
    assert index.change(None, one) == [N1]
    assert index.change(one, both) == [N2]
    assert [list(index.on(id)) for id in (N1, N2, N3)] == [["v1"], ["v1"], []]
    moved = a_volume(N2, N3)
    assert index.change(both, moved) == [N1, N3]
    assert [list(index.on(id)) for id in (N1, N2, N3)] == [[], ["v1"], ["v1"]]
    assert index.change(moved, None) == [N2, N3]
    assert list(index.on(N2)) == []
    index.reset([one])
    assert [list(index.on(id)) for id in (N1, N2)] == [["v1"], []]


async def test_the_volumes_of_a_node_are_found_without_a_look_at_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, index = MemoryStore(SystemClock()), VolumeIndex()
    published = a_volume(N1)
    await store.update(lambda tx: tx.put(published))
    for number in range(100):
        name = f"other{number}"
        on_n2 = replace(a_volume(N2), id=VolumeId(name), spec=VolumeSpec(name=name))
        await store.update(lambda tx, one=on_n2: tx.put(one))
    index.reset(store.view().find(Volume))
    for name in ("find", "ids"):
        monkeypatch.setattr(type(store.view()), name, _not_of_volumes(type(store.view()), name))
    message, sent = everything(store.view(), N1, index.on)
    assert [one.id for one in message.volumes] == ["v1"]
    leaving = a_volume(N1, state=PublishState.PENDING_NODE_UNPUBLISH)
    await store.update(lambda tx: tx.put(leaving))
    change, sent = difference(store.view(), N1, sent, [], index.on)
    assert change is not None
    assert [one.id for one in change.removed_volumes] == ["v1"]
    await store.update(lambda tx: tx.delete(Volume, "v1"))
    index.change(leaving, None)
    assert difference(store.view(), N1, sent, [], index.on)[0] is None


def _not_of_volumes(view: type[View], name: str) -> object:
    original = getattr(view, name)

    def checked(self: View, kind: type, **by: str) -> object:
        assert kind is not Volume, "all volumes were looked at"
        return original(self, kind, **by)

    return checked
