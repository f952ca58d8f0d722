"""Who may have a cluster volume: the same as with a look at all volumes, tasks and nodes, and found without one."""

from collections.abc import Mapping
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.manager.scheduler.nodes import volumes as volumes_module
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.candidates import Candidates
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.nodes.volumes import VolumeUses
from skep.model.needs import ClusterMount, VolumeUse, holds_of
from skep.model.node import CSIInfo, Node, Topology
from skep.model.task import VolumeAttachment
from skep.model.values.ids import NodeId, ServiceId, TaskId, VolumeId
from skep.model.values.meta import Driver
from skep.model.volume import (
    GROUP_PREFIX,
    AccessMode,
    PublishState,
    PublishStatus,
    Volume,
    VolumeAvailability,
    VolumeInfo,
    VolumeScope,
    VolumeSharing,
    VolumeSpec,
    fits_topology,
)
from tests.support.builders import a_node, a_task
from tests.support.managers.counted_calls import calls_of, most_calls_between_pauses

ZONES = [Topology(segments={"zone": zone}) for zone in "ab"]
ROOM = 3
Users = Mapping[TaskId, tuple[NodeId, bool]]


def a_volume(name: str, **fields: Any) -> Volume:
    spec = VolumeSpec(
        name=name,
        group=fields.pop("group", ""),
        driver=Driver(name=fields.pop("driver", "d")),
        access_mode=AccessMode(
            scope=fields.pop("scope", VolumeScope.MULTI), sharing=fields.pop("sharing", VolumeSharing.ALL)
        ),
        availability=fields.pop("availability", VolumeAvailability.ACTIVE),
    )
    return Volume(id=VolumeId(f"id-{name}"), spec=spec, **{"info": VolumeInfo(volume_id=name), **fields})


def with_driver(id: str, *, driver: str = "d", at_most: int = 0, place: Topology | None = None) -> Node:
    made = a_node(id)
    info = CSIInfo(plugin_name=driver, node_id=id, max_volumes_per_node=at_most, accessible_topology=place)
    return replace(made, description=replace(made.description, csi_info=(info,)))


# -- the same as with a look at everything -----------------------------------------------------------------------------


class Careful:
    """Looks at all volumes and their users each time."""

    def __init__(self) -> None:
        self.volumes: dict[VolumeId, Volume] = {}
        self.users: dict[VolumeId, dict[TaskId, tuple[NodeId, bool]]] = {}

    def choose(self, mount: ClusterMount, node: Node) -> list[VolumeId]:
        group = mount.source.removeprefix(GROUP_PREFIX)
        candidates = [
            one
            for one in self.volumes.values()
            if (one.spec.group == group if group != mount.source else one.spec.name == group)
        ]
        candidates.sort(
            key=lambda one: (one.status_on(node.id) is None, len(self.users.get(one.id, {})), one.spec.name)
        )
        return [one.id for one in candidates if self.may_have(one, mount, node)][:1]

    def may_have(self, volume: Volume, mount: ClusterMount, node: Node) -> bool:
        (info,) = node.description.csi_info
        users = list(self.users.get(volume.id, {}).values())
        entries = {one.node_id: one for one in volume.publish_status}
        places = {*entries, *(node_id for node_id, _ in users)}
        mode, status = volume.spec.access_mode, entries.get(node.id)
        drivers = [
            one.spec.driver.name
            for one in self.volumes.values()
            if one.status_on(node.id)
            or any(node_id == node.id for node_id, _ in self.users.get(one.id, {}).values())
        ]
        return (
            not volume.pending_delete
            and volume.info is not None
            and volume.spec.availability is VolumeAvailability.ACTIVE
            and info.plugin_name == volume.spec.driver.name
            and fits_topology(info.accessible_topology, volume.info.accessible_topology)
            and not (mode.scope is VolumeScope.SINGLE and places - {node.id})
            and (status is None or status.takes_tasks)
            and not (mode.sharing is VolumeSharing.NONE and users)
            and not (
                mode.sharing is VolumeSharing.ONE_WRITER
                and not mount.read_only
                and not all(read_only for _, read_only in users)
            )
            and not (mode.sharing is VolumeSharing.READ_ONLY and not mount.read_only)
            and not (status is None and len(places - entries.keys() - {node.id}) >= room_of(volume))
            and not (
                status is None
                and info.max_volumes_per_node
                and drivers.count(info.plugin_name) >= info.max_volumes_per_node
            )
        )


def room_of(volume: Volume) -> int:
    """Few, so that it is reached: an entry takes more while its driver has not answered."""
    pending = sum(one.state is PublishState.PENDING for one in volume.publish_status)
    return max(0, ROOM - pending)


def some_volume(random: Random, name: str) -> Volume:
    states = [PublishState.PENDING, PublishState.PUBLISHED, PublishState.PENDING_UNPUBLISH]
    return a_volume(
        name,
        group=random.choice(["", "g"]),
        driver="e" if name == "v3" else "d",
        scope=random.choice(list(VolumeScope)),
        sharing=random.choice(list(VolumeSharing)),
        availability=random.choice([VolumeAvailability.ACTIVE, *VolumeAvailability]),
        info=random.choice(
            [None, *[VolumeInfo(volume_id=name, accessible_topology=(random.choice(ZONES),))] * 4]
        ),
        pending_delete=random.random() < 0.1,
        publish_status=tuple(
            PublishStatus(node_id=NodeId(f"n{number}"), state=random.choice(states))
            for number in random.sample(range(6), random.choice([0, 0, 1, 3]))
        ),
    )


class Twins:
    """Both accounts of one cluster, with some change after another."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.careful = Careful()
        self.accounting = Accounting()
        self.nodes = [
            with_driver(
                f"n{number}",
                driver=self.random.choice(["d", "d", "e"]),
                at_most=self.random.choice([0, 2]),
                place=self.random.choice([None, *ZONES]),
            )
            for number in range(6)
        ]
        for node in self.nodes:
            self.accounting.set_node(node)
        sources = ["v0", "v1", "v2", "group:g"]
        self.mounts = [ClusterMount(one, "/d", read_only) for one in sources for read_only in (True, False)]

    def change(self) -> None:
        name = f"v{self.random.randrange(5)}"
        id, task_id = VolumeId(f"id-{name}"), TaskId(f"t{self.random.randrange(9)}")
        match self.random.randrange(4):
            case 0 | 1:
                volume = some_volume(self.random, name)
                if (before := self.careful.volumes.get(id)) and self.random.random() < 0.5:
                    volume = replace(before, publish_status=volume.publish_status)
                self.careful.volumes[id] = volume
                self.accounting.update_volume(id, volume)
            case 2 if self.random.random() < 0.3:
                self.careful.volumes.pop(id, None)
                self.accounting.update_volume(id, None)
            case _:
                for users in self.careful.users.values():
                    users.pop(task_id, None)
                self.accounting.remove(task_id)
                if self.random.random() < 0.7:
                    node, read_only = self.random.choice(self.nodes), self.random.random() < 0.5
                    self.careful.users.setdefault(id, {})[task_id] = node.id, read_only
                    usage = replace(holds_of(a_task(), ()), volumes=(VolumeUse(id, read_only),))
                    self.accounting.reserve(task_id, node.id, usage)

    def answers(self) -> dict[tuple[ClusterMount, NodeId], list[VolumeId]]:
        return {
            (mount, node.id): self.careful.choose(mount, node) for mount in self.mounts for node in self.nodes
        }


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_same_and_every_node_that_got_better_is_looked_at_again(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes_module, "room_for_nodes", room_of)
    twins = Twins(seed)
    before, seen = twins.answers(), twins.accounting.changes
    for _ in range(60):
        twins.change()
        now = twins.answers()
        for (mount, node_id), expected in now.items():
            account = twins.accounting.accounts[node_id]
            found = twins.accounting.volumes.choose([mount], account.node)
            assert ([one.id for one in found] if not isinstance(found, str) else []) == expected
            if expected and not before[mount, node_id]:
                assert node_id in twins.accounting.changed_since(seen, [mount])
        before, seen = now, twins.accounting.changes


# -- without a look at everything --------------------------------------------------------------------------------------


def calls_to_choose(found: VolumeUses, source: str) -> int:
    mount, node = ClusterMount(source, "/d", read_only=False), with_driver("last", at_most=9)

    def choosing() -> Any:
        assert not isinstance(found.choose([mount], node), str)
        yield

    return most_calls_between_pauses(choosing())


def of_a_cluster(volumes: int, users: int) -> VolumeUses:
    """One volume is shared by all tasks; of the others, a group, each but the last is a task's."""
    found = VolumeUses()
    found.set_volume(a_volume("shared"))
    for number in range(users):
        found.hold(TaskId(f"t{number}"), NodeId(f"n{number % 60}"), [VolumeUse(VolumeId("id-shared"), False)])
    for number in range(volumes):
        found.set_volume(a_volume(f"g{number:04}", group="g", scope=VolumeScope.SINGLE))
        if number != volumes - 1:
            use = VolumeUse(VolumeId(f"id-g{number:04}"), False)
            found.hold(TaskId(f"g{number}"), NodeId(f"n{number}"), [use])
    return found


@pytest.mark.parametrize("source", ["shared", "group:g"])
def test_a_check_of_a_node_costs_the_same_with_ten_times_as_many_volumes_and_users(source: str) -> None:
    small, large = (calls_to_choose(of_a_cluster(many, 10 * many), source) for many in (100, 1000))
    assert large <= small + 2


def test_a_volume_concerns_the_nodes_that_may_have_it_and_the_tasks_that_mount_it() -> None:
    accounting = Accounting()
    for number in range(50):
        accounting.set_node(with_driver(f"n{number}", driver="d" if number < 3 else "e"))
    plain = Requirements(service_id=ServiceId("s"), version=1)
    mounting = [replace(plain, cluster_volumes=(ClusterMount(name, "/d", False),)) for name in ("a", "b")]
    pools = [Candidates(one, accounting) for one in (plain, *mounting)]

    def put(volume: Volume) -> None:
        accounting.update_volume(volume.id, volume)

    def looked_at() -> list[list[str]]:
        found = []
        for pool in pools:
            with calls_of(Candidates._update_node) as looked:
                for _ in pool.catching_up():
                    pass
            found.append(sorted(call["id"] for call in looked.of(Candidates._update_node)))
        return found

    looked_at()
    put(a_volume("a", scope=VolumeScope.SINGLE))
    assert looked_at() == [[], ["n0", "n1", "n2"], []]
    there = PublishStatus(node_id=NodeId("n1"), state=PublishState.PENDING)
    put(a_volume("a", scope=VolumeScope.SINGLE, publish_status=(there,)))
    assert looked_at() == [["n1"]] * 3, "it may have had the last one that it can have"
    put(a_volume("a", scope=VolumeScope.SINGLE, publish_status=(there,), message="news"))
    assert looked_at() == [[], [], []]
    task = replace(a_task("t", node="n1"), volumes=(VolumeAttachment(id="id-a", source="a", target="/d"),))
    accounting.add(task, ())
    accounting.remove(task.id)
    assert looked_at() == [["n1"]] * 3
    put(a_volume("a", scope=VolumeScope.SINGLE))
    assert looked_at() == [["n1"], ["n0", "n1", "n2"], ["n1"]]
