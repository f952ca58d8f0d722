"""What follows from the stored state of a cluster volume and the nodes that need it."""

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from skep.csi.driver import MAP_BYTES_MAX
from skep.manager.volumes.loop import MESSAGE_CHARACTERS_MAX
from skep.manager.volumes.steps import (
    CreateVolume,
    Delete,
    Forget,
    Publish,
    Unpublish,
    doubted,
    settled,
    steps,
)
from skep.model.node import CSIInfo, Node, NodeState
from skep.model.values.ids import NodeId, VolumeId
from skep.model.values.meta import Driver
from skep.model.volume import (
    ENTRIES_BYTES_MAX,
    AccessMode,
    PublishState,
    PublishStatus,
    Volume,
    VolumeInfo,
    VolumeScope,
    VolumeSpec,
)
from skep.store.schema import SCHEMA_BY_TYPE
from tests.support.builders import a_node

N1, N2 = NodeId("n1"), NodeId("n2")
NONE: frozenset[NodeId] = frozenset()
PENDING, PUBLISHED = PublishState.PENDING, PublishState.PUBLISHED
LEAVING, UNPUBLISHING = PublishState.PENDING_NODE_UNPUBLISH, PublishState.PENDING_UNPUBLISH


def a_volume(*statuses: PublishStatus, multi: bool = False, **fields: Any) -> Volume:
    scope = VolumeScope.MULTI if multi else VolumeScope.SINGLE
    spec = VolumeSpec(name="data", driver=Driver(name="d"), access_mode=AccessMode(scope=scope))
    fields = {"info": VolumeInfo(volume_id="x"), **fields}
    return Volume(id=VolumeId("v"), spec=spec, publish_status=statuses, **fields)


def on(node: NodeId, state: PublishState, **fields: Any) -> PublishStatus:
    return PublishStatus(node_id=node, state=state, **{"driver_node_id": f"d-{node}", **fields})


def node(id: NodeId) -> Node:
    made = a_node(id)
    info = CSIInfo(plugin_name="d", node_id=f"d-{id}")
    return replace(made, description=replace(made.description, csi_info=(info,)))


def states(volume: Volume, needed: frozenset[NodeId], find: Any = node) -> dict[str, PublishState]:
    return {one.node_id: one.state for one in settled(volume, needed, find).publish_status}


def test_a_call_that_makes_something_is_announced_first() -> None:
    assert list(steps(a_volume(info=None), NONE)) == [CreateVolume()]
    (status,) = settled(a_volume(), frozenset({N1}), node).publish_status
    assert (status.state, status.driver_node_id) == (PENDING, "d-n1")


def test_what_was_never_asked_of_the_driver_is_forgotten_and_what_may_have_been_is_found_and_deleted() -> (
    None
):
    assert list(steps(settled(a_volume(info=None, pending_delete=True), NONE, node), NONE)) == [Forget()]
    unknown = settled(a_volume(info=None, pending_delete=True, is_creating=True), NONE, node)
    assert list(steps(unknown, NONE)) == [CreateVolume()]
    assert list(steps(a_volume(pending_delete=True), NONE)) == [Delete()]


@pytest.mark.parametrize("state", list(PublishState))
def test_nothing_is_deleted_that_may_be_on_a_node_or_that_a_task_needs(state: PublishState) -> None:
    volume = a_volume(on(N1, state), pending_delete=True)
    assert Delete() not in steps(volume, NONE)
    assert Delete() not in steps(a_volume(pending_delete=True), frozenset({N1}))


@pytest.mark.parametrize("state", list(PublishState))
def test_a_volume_for_one_node_goes_to_no_second_one_while_anything_is_left_of_the_first(
    state: PublishState,
) -> None:
    both = frozenset({N1, N2})
    assert N2 not in states(a_volume(on(N1, state)), both)
    assert N2 in states(a_volume(on(N1, state), multi=True), both)


def test_a_node_gives_a_volume_up_before_the_controller_takes_it() -> None:
    volume = settled(a_volume(on(N1, PUBLISHED)), NONE, node)
    (closing,) = volume.publish_status
    assert (closing.state, closing.is_closing, closing.takes_tasks) == (PUBLISHED, True, False)
    (again,) = settled(volume, frozenset({N1}), node).publish_status
    assert (again.state, again.takes_tasks) == (PUBLISHED, True)
    volume = settled(volume, NONE, node)
    assert volume.publish_status[0].state is LEAVING
    assert not list(steps(volume, NONE))
    assert states(volume, frozenset({N1})) == {
        N1: LEAVING
    }  # forward only: the node may have given it up already
    assert list(steps(a_volume(on(N1, UNPUBLISHING)), NONE)) == [Unpublish(N1, "d-n1")]


def test_a_publication_that_may_have_reached_the_driver_is_undone() -> None:
    assert list(steps(a_volume(on(N1, PENDING)), frozenset({N1}))) == [Publish(N1, "d-n1")]
    assert states(a_volume(on(N1, PENDING)), NONE) == {N1: UNPUBLISHING}
    assert states(a_volume(on(N1, PENDING, driver_node_id="")), NONE) == {}


def test_a_node_without_the_driver_is_waited_for_by_name() -> None:
    (status,) = settled(a_volume(), frozenset({N1}), a_node).publish_status
    assert status.message == "node n1 has no driver d"
    assert not list(steps(a_volume(status), frozenset({N1})))
    (found,) = settled(a_volume(status), frozenset({N1}), node).publish_status
    assert (found.driver_node_id, found.message) == ("d-n1", "")


def test_a_node_that_is_down_keeps_its_volumes_until_it_is_removed_from_the_cluster() -> None:
    def down(id: NodeId) -> Node:
        return replace(node(id), status=replace(node(id).status, state=NodeState.DOWN))

    volume = settled(a_volume(on(N1, PUBLISHED, is_closing=True)), NONE, down)
    assert volume.publish_status[0].state is LEAVING
    assert volume.publish_status[0].message.startswith("node n1 is down: the volume counts as mounted there")
    for state in (PUBLISHED, LEAVING):
        assert states(a_volume(on(N1, state)), NONE, lambda _: None) == {N1: UNPUBLISHING}


def test_of_a_volume_for_all_nodes_no_more_is_kept_than_the_store_takes() -> None:
    """With what drivers may say of each node, and an error of each."""
    volume, needed = a_volume(multi=True), frozenset(NodeId(f"n{number:04}") for number in range(500))
    context = {"path": "x" * (MAP_BYTES_MAX - 4)}
    announced: list[int] = []
    for _ in range(5):
        volume = settled(volume, needed, node)
        announced.append(len(volume.publish_status))
        done = (
            replace(one, state=PUBLISHED, publish_context=context, message="x" * MESSAGE_CHARACTERS_MAX)
            for one in volume.publish_status
        )
        volume = replace(volume, publish_status=tuple(done))
        assert len(msgspec.json.encode(volume.publish_status)) < SCHEMA_BY_TYPE[Volume].max_bytes
    assert 50 < announced[0] <= announced[-1] < 150
    small = a_volume(multi=True)
    for _ in range(6):
        small = settled(small, needed, node)
        done = (replace(one, state=PUBLISHED) for one in small.publish_status)
        small = replace(small, publish_status=tuple(done))
    assert len(small.publish_status) > 300


def test_a_volume_that_may_be_anywhere_is_published_after_all_other_nodes_have_given_it_up() -> None:
    """As after a restore: what is stored may be older than what was done."""
    nodes = [node(N1), node(N2), a_node("without the driver")]
    stored = a_volume(on(N1, PUBLISHED, publish_context={"device": "old"}))
    volume = doubted(stored, {N1}, nodes)
    assert doubted(volume, {N1}, nodes) == volume
    assert [(one.node_id, one.state) for one in volume.publish_status] == [(N1, PENDING), (N2, LEAVING)]
    assert all(one.is_doubtful and not one.publish_context for one in volume.publish_status)
    volume = settled(volume, {N1}, node)
    assert list(steps(volume, {N1})) == []
    assert volume.publish_status[0].message == "waiting for confirmation that it is not mounted on n2"
    given_up = replace(volume.publish_status[1], state=UNPUBLISHING)
    volume = replace(volume, publish_status=(volume.publish_status[0], given_up))
    assert list(steps(volume, {N1})) == [Unpublish(N2, "d-n2")]
    volume = replace(volume, publish_status=volume.publish_status[:1])
    assert list(steps(settled(volume, {N1}, node), {N1})) == [Publish(N1, "d-n1")]


def test_a_node_that_may_have_a_volume_is_asked_for_it_before_the_controller_takes_it() -> None:
    for state in PublishState:
        volume = doubted(a_volume(on(N1, state)), {N1}, [node(N1)])
        assert states(volume, NONE) == {N1: LEAVING}
        assert states(volume, NONE, lambda _: None) == {N1: UNPUBLISHING}


def test_no_call_about_a_volume_that_may_be_anywhere_is_about_all_nodes_at_once() -> None:
    """CSI takes a call without a node's id as one about all nodes."""
    volume = doubted(a_volume(on(N1, PENDING, driver_node_id="")), NONE, [a_node("n1")])
    assert settled(volume, NONE, lambda _: a_node("n1")).publish_status == ()


def test_a_volume_for_several_nodes_is_published_while_others_are_asked_and_one_not_made_yet_is_asked_for() -> (
    None
):
    volume = doubted(a_volume(on(N1, PUBLISHED), multi=True), {N1}, [node(N1), node(N2)])
    assert list(steps(settled(volume, {N1}, node), {N1})) == [Publish(N1, "d-n1")]
    unmade = doubted(a_volume(info=None, pending_delete=True), NONE, [node(N1)])
    assert (unmade.is_creating, list(steps(unmade, NONE))) == (True, [CreateVolume()])


def test_of_a_volume_that_may_be_anywhere_no_more_is_kept_than_the_store_takes() -> None:
    nodes = [node(NodeId(f"n{number:04}")) for number in range(3000)]
    volume = doubted(a_volume(multi=True), NONE, nodes)
    assert len(volume.publish_status) > 500
    assert len(msgspec.json.encode(volume.publish_status)) < ENTRIES_BYTES_MAX


def test_nodes_without_the_driver_take_no_room_from_those_that_may_have_the_volume() -> None:
    others = [a_node(f"n{number:04}") for number in range(3000)]
    volume = doubted(a_volume(), NONE, [*others, node(NodeId("z"))])
    assert [one.node_id for one in volume.publish_status] == ["z"]
