"""Which cluster volumes a task can have on a node, and the words about those that it cannot."""

from typing import Any

import pytest
from msgspec.structs import replace

from skep.manager.scheduler.nodes.volumes import VolumeUses, still_fits
from skep.model.needs import ClusterMount, VolumeUse
from skep.model.node import CSIInfo, Node, Topology
from skep.model.values.ids import NodeId, TaskId, VolumeId
from skep.model.values.meta import Driver
from skep.model.volume import (
    AccessMode,
    PublishState,
    PublishStatus,
    Volume,
    VolumeAvailability,
    VolumeInfo,
    VolumeScope,
    VolumeSharing,
    VolumeSpec,
)
from tests.support.builders import a_node

A, B = Topology(segments={"zone": "a"}), Topology(segments={"zone": "b"})


def a_volume(name: str = "data", **fields: Any) -> Volume:
    mode = AccessMode(
        scope=fields.pop("scope", VolumeScope.SINGLE), sharing=fields.pop("sharing", VolumeSharing.NONE)
    )
    spec = VolumeSpec(
        name=name,
        group=fields.pop("group", ""),
        driver=Driver(name="d"),
        access_mode=mode,
        availability=fields.pop("availability", VolumeAvailability.ACTIVE),
    )
    return Volume(id=VolumeId(f"id-{name}"), spec=spec, **{"info": VolumeInfo(volume_id=name), **fields})


def node(id: str = "n1", *, at_most: int = 0, place: Topology | None = A) -> Node:
    made = a_node(id)
    info = CSIInfo(plugin_name="d", node_id=id, max_volumes_per_node=at_most, accessible_topology=place)
    return replace(made, description=replace(made.description, csi_info=(info,)))


def on(id: str, state: PublishState = PublishState.PUBLISHED, **fields: Any) -> PublishStatus:
    return PublishStatus(node_id=NodeId(id), state=state, **fields)


def uses(*volumes: Volume, **tasks: tuple[str, str, bool]) -> VolumeUses:
    """``tasks``: name -> volume, node, whether it only reads."""
    found = VolumeUses()
    for volume in volumes:
        found.set_volume(volume)
    for task, (volume, where, read_only) in tasks.items():
        found.hold(TaskId(task), NodeId(where), [VolumeUse(VolumeId(f"id-{volume}"), read_only)])
    return found


def chosen(
    found: VolumeUses, source: str = "data", *, read_only: bool = False, where: Node | None = None
) -> Any:
    result = found.choose([ClusterMount(source, "/d", read_only)], where or node())
    return result if isinstance(result, str) else [one.id.removeprefix("id-") for one in result]


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        (a_volume("other"), "no such cluster volume: data"),
        (a_volume(pending_delete=True), "cluster volume data is being deleted"),
        (a_volume(info=None, message="no driver"), "cluster volume data is not created yet: no driver"),
        (a_volume(availability=VolumeAvailability.PAUSE), "cluster volume data has availability pause"),
        (a_volume(availability=VolumeAvailability.DRAIN), "cluster volume data has availability drain"),
        (
            a_volume(info=VolumeInfo(volume_id="x", accessible_topology=(B,))),
            "is not accessible from the node",
        ),
        (a_volume(publish_status=(on("n2"),)), "cluster volume data is on another node"),
        (
            a_volume(publish_status=(on("n1", PublishState.PENDING_UNPUBLISH),)),
            "is being unpublished from the node",
        ),
        (a_volume(publish_status=(on("n1", is_closing=True),)), "is being unpublished from the node"),
        (a_volume(sharing=VolumeSharing.READ_ONLY), "is read-only: mount it with readonly"),
    ],
)
def test_a_volume_that_cannot_be_had_says_why(volume: Volume, words: str) -> None:
    assert words in chosen(uses(volume))


def test_a_node_needs_the_driver_and_room_for_it() -> None:
    assert "needs driver d, which the node does not have" in chosen(uses(a_volume()), where=a_node())
    full = uses(a_volume(), a_volume("first", publish_status=(on("n1"),)))
    assert "at its limit of 1 volume of driver d" in chosen(full, where=node(at_most=1))
    assert chosen(full, "first", where=node(at_most=1)) == ["first"]


@pytest.mark.parametrize(
    ("sharing", "reads", "other_reads", "fits"),
    [
        (VolumeSharing.NONE, True, True, False),
        (VolumeSharing.ONE_WRITER, False, True, True),
        (VolumeSharing.ONE_WRITER, False, False, False),
        (VolumeSharing.ONE_WRITER, True, False, True),
        (VolumeSharing.READ_ONLY, True, True, True),
        (VolumeSharing.ALL, False, False, True),
    ],
)
def test_sharing(sharing: VolumeSharing, reads: bool, other_reads: bool, fits: bool) -> None:
    found = uses(a_volume(sharing=sharing), t1=("data", "n1", other_reads))
    assert (chosen(found, read_only=reads) == ["data"]) is fits


def test_scope() -> None:
    used = {"t1": ("data", "n2", False)}
    single, multi = (a_volume(sharing=VolumeSharing.ALL, scope=scope) for scope in VolumeScope)
    assert "is on another node" in chosen(uses(single, **used))
    assert chosen(uses(single, **used), where=node("n2")) == ["data"]
    assert chosen(uses(multi, **used)) == ["data"]


def test_of_a_group_the_one_that_is_there_comes_first_then_the_least_used() -> None:
    free = {"group": "g", "sharing": VolumeSharing.ALL}
    one, two = a_volume("one", **free), a_volume("two", **free)
    assert chosen(uses(one, two), "group:g") == ["one"]
    assert chosen(uses(one, two, t1=("one", "n1", False)), "group:g") == ["two"]
    there = replace(one, publish_status=(on("n1"),))
    assert chosen(uses(there, two, t1=("one", "n1", False)), "group:g") == ["one"]
    assert chosen(uses(one, two), "group:none") == "no such cluster volume: group:none"


def test_two_mounts_of_a_group_that_is_not_shared_are_two_volumes() -> None:
    found = uses(a_volume("one", group="g"), a_volume("two", group="g"))
    mounts = [ClusterMount("group:g", f"/{number}", read_only=False) for number in range(2)]
    result = found.choose(mounts, node())
    assert not isinstance(result, str)
    assert {one.id for one in result} == {"id-one", "id-two"}


def test_what_changes_between_choice_and_write_is_seen() -> None:
    n1 = NodeId("n1")
    assert still_fits(a_volume(publish_status=(on("n1"),)), n1)
    assert not still_fits(None, n1)
    for late in (
        a_volume(pending_delete=True),
        a_volume(availability=VolumeAvailability.PAUSE),
        a_volume(publish_status=(on("n2"),)),
        a_volume(publish_status=(on("n1", is_closing=True),)),
    ):
        assert not still_fits(late, n1)


def test_a_volume_on_as_many_nodes_as_can_be_kept_goes_to_no_further_one() -> None:
    mode = {"scope": VolumeScope.MULTI, "sharing": VolumeSharing.ALL}
    many = [on(f"x{number}", PublishState.PENDING) for number in range(77)]
    mounts = [ClusterMount("data", "/d", read_only=False)]
    fits = a_volume(publish_status=tuple(many), **mode)
    assert not isinstance(uses(fits).choose(mounts, node()), str)
    assert not isinstance(uses(fits, a=("data", "x78", False)).choose(mounts, node("x78")), str)
    held = {f"t{number}": ("data", f"y{number}", False) for number in range(10)}
    assert "the maximum for one volume" in str(uses(fits, **held).choose(mounts, node()))
    full = a_volume(
        publish_status=(*many, *(on(f"z{number}", PublishState.PENDING) for number in range(10))), **mode
    )
    assert "the maximum for one volume" in str(uses(full).choose(mounts, node()))
    assert not isinstance(uses(full).choose(mounts, node("x1")), str)
