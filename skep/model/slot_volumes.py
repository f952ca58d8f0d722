"""Local volumes with the data of a service's slots: which node has them.

A node reports, in an engine label, which slots have used its volumes, so that managers have it after the tasks are gone
and while the node is down.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.model.container import Mount
from skep.model.ids import NodeId
from skep.model.node import Node, NodeDescription
from skep.model.service import TaskSpec
from skep.model.task import Task, TaskState
from skep.model.times import unix_ns

SLOT_VOLUMES_LABEL: Final = "skep.slot-volumes"
FORGOTTEN_LABEL: Final = "skep.forgotten-volumes"
"""Of a node's spec: its local volumes that were given up while it was away, with the time of the latest use that counts
as forgotten."""
FORGOTTEN_MAX: Final = 500
LABEL_CHARACTERS_MAX: Final = 32 * 1024
_WORD = re.compile(r"([a-zA-Z0-9][\w.-]+)=([a-zA-Z0-9][\w-]*)\.([0-9]{1,9})@([0-9]{1,15})", re.ASCII)
_FORGOTTEN = re.compile(r"([a-zA-Z0-9][\w.-]+)@([0-9]{1,15})", re.ASCII)
_MILLISECOND_NS = 1_000_000
_LOCATING = ("type", "device")
"""Options of a volume whose data is where they say, on another machine perhaps."""

SlotName: TypeAlias = tuple[str, int]
"""A service's name and the number of a slot."""


_Shape: TypeAlias = tuple[str, str | None]
"""How names begin and end; without an end: the only name."""


class SlotVolume(msgspec.Struct, frozen=True, gc=False):
    """A volume that a task of a slot has had on a node.  ``at_ms``: when the last such task was created, Unix time."""

    volume: str
    service: str
    slot: int
    at_ms: int


class Home(msgspec.Struct, frozen=True, gc=False):
    """A node with a slot's data, and the volume that has it."""

    node_id: NodeId
    volume: str


def created_ms(task: Task) -> int:
    """When the task was created, by the clock of a manager."""
    return unix_ns(task.created_at) // _MILLISECOND_NS


def slot_volumes_label(found: Iterable[SlotVolume]) -> str:
    """``data=web.2@1763894400000``, separated by spaces; the latest ones, as many as fit."""
    words: list[str] = []
    left = LABEL_CHARACTERS_MAX
    for one in sorted(found, key=lambda one: (-one.at_ms, one.volume, one.service, one.slot)):
        words.append(f"{one.volume}={one.service}.{one.slot}@{one.at_ms}")
        left -= len(words[-1]) + 1
        if left < 0:
            words.pop()
            break
    return " ".join(words)


def has_other_properties(before: Node, after: Node) -> bool:
    """Whether a node describes itself differently, other than by the slots that have used its volumes.

    These change with the node's own tasks, and do not tell whether a running task may stay there.
    """
    return differ_beyond_slots(before.description, after.description)


def differ_beyond_slots(one: NodeDescription, other: NodeDescription) -> bool:
    """Whether two descriptions of a node differ in more than the slots that have used its volumes."""
    if one == other:
        return False
    if one.engine.labels == other.engine.labels:
        return True
    return _without_slots(one) != _without_slots(other)


def differ_in_slots_alone(before: Node, after: Node) -> bool:
    """Whether only the slots that have used volumes of a node, and its load, have changed."""
    is_other = before.description != after.description and not has_other_properties(before, after)
    return is_other and replace(before, description=after.description, load=after.load) == after


def _without_slots(description: NodeDescription) -> NodeDescription:
    labels = {name: value for name, value in description.engine.labels.items() if name != SLOT_VOLUMES_LABEL}
    return replace(description, engine=replace(description.engine, labels=labels))


def slot_volumes_of(node: Node) -> list[SlotVolume]:
    """What the node's label has; what cannot be read is ignored."""
    return slot_volumes_in(node.description.engine.labels.get(SLOT_VOLUMES_LABEL, ""))


def slot_volumes_in(label: str) -> list[SlotVolume]:
    """What such a label has."""
    matches = (_WORD.fullmatch(word) for word in label[:LABEL_CHARACTERS_MAX].split())
    return [SlotVolume(one[1], one[2], int(one[3]), int(one[4])) for one in matches if one is not None]


def forgotten_label(forgotten: Mapping[str, int]) -> str:
    """``data@1763894400000``, separated by spaces; the latest ones."""
    latest = sorted(forgotten.items(), key=lambda item: (-item[1], item[0]))[:FORGOTTEN_MAX]
    return " ".join(f"{name}@{at_ms}" for name, at_ms in latest)


def forgotten_in(label: str) -> dict[str, int]:
    """Volumes -> up to when use of them is forgotten; what cannot be read is ignored."""
    matches = (_FORGOTTEN.fullmatch(word) for word in label[:LABEL_CHARACTERS_MAX].split())
    return {one[1]: int(one[2]) for one in matches if one is not None}


def local_volumes(spec: TaskSpec) -> tuple[str, ...]:
    """Names of the volumes whose data stays on its node, as the spec has them: with placeholders, perhaps."""
    mounts = spec.container_spec.mounts if spec.container_spec is not None else ()
    return tuple(mount.source for mount in mounts if _is_local(mount)) if mounts else ()


def _is_local(mount: Mount) -> bool:
    driver = mount.volume_options.driver_config if mount.volume_options is not None else None
    if mount.type not in ("volume", "") or not mount.source:
        return False
    return driver is None or (
        driver.name in ("", "local") and not any(driver.options.get(name) for name in _LOCATING)
    )


class VolumeIndex:
    """Which nodes report a volume of a slot."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._labels: dict[NodeId, str] = {}
        self._slots: dict[NodeId, tuple[SlotName, ...]] = {}
        self._by_slot: dict[SlotName, dict[NodeId, Sequence[SlotVolume]]] = {}
        self._forgotten: dict[NodeId, Mapping[str, int]] = {}
        for node in nodes:
            self.set_node(node)

    def set_node(self, node: Node) -> Collection[SlotName]:
        """Enter a node that was created or changed; return the slots about which it reports something else."""
        if forgotten := forgotten_in(node.spec.labels.get(FORGOTTEN_LABEL, "")):
            self._forgotten[node.id] = forgotten
        else:
            self._forgotten.pop(node.id, None)
        label = node.description.engine.labels.get(SLOT_VOLUMES_LABEL, "")
        if label == self._labels.get(node.id, ""):
            return ()
        before = {slot: self._by_slot[slot][node.id] for slot in self._slots.get(node.id, ())}
        self._remove_label(node.id)
        self._labels[node.id] = label
        by_slot: dict[SlotName, list[SlotVolume]] = {}
        for one in slot_volumes_of(node):
            by_slot.setdefault((one.service, one.slot), []).append(one)
        for slot, found in by_slot.items():
            self._by_slot.setdefault(slot, {})[node.id] = found
        self._slots[node.id] = tuple(by_slot)
        return {slot for slot in {*before, *by_slot} if before.get(slot) != by_slot.get(slot)}

    def remove_node(self, node_id: NodeId) -> None:
        """A node was removed: its volumes are given up."""
        self._forgotten.pop(node_id, None)
        self._remove_label(node_id)

    def _remove_label(self, node_id: NodeId) -> None:
        if self._labels.pop(node_id, None) is None:
            return
        for slot in self._slots.pop(node_id):
            nodes = self._by_slot[slot]
            del nodes[node_id]
            if not nodes:
                del self._by_slot[slot]

    def is_forgotten(self, node_id: NodeId, name: str, at_ms: int) -> bool:
        """Whether use of a volume at that time is given up; ``name``: with placeholders, perhaps."""
        forgotten = self._forgotten.get(node_id)
        if not forgotten:
            return False
        shape = _shape(name)
        return any(at_ms <= until_ms and _is_named(volume, shape) for volume, until_ms in forgotten.items())

    def of(self, slot: SlotName) -> Mapping[NodeId, Sequence[SlotVolume]]:
        """What nodes report of a slot."""
        return self._by_slot.get(slot, _NONE)


_NONE: Mapping[NodeId, Sequence[SlotVolume]] = MappingProxyType({})


def homes_of(task: Task, service_name: str, past: Iterable[Task], index: VolumeIndex) -> tuple[Home, ...]:
    """The nodes that have local volumes of the task's slot, the one with the latest data first.

    ``past``: tasks of the slot.  They count before reports: a node that reports what it does not have gets no task by
    it whose slot has a history.
    """
    volumes = local_volumes(task.spec)
    if not volumes or not task.slot:
        return ()
    found: dict[NodeId, Home] = {}
    for other in sorted((one for one in past if _had_volumes(one)), key=created_ms, reverse=True):
        shared = next((one for one in local_volumes(other.spec) if one in volumes), None)
        if other.id != task.id and shared is not None:
            name = shared.replace("{{.Task.Slot}}", str(task.slot))
            if index.is_forgotten(other.node_id, name, created_ms(other)):
                continue
            found.setdefault(other.node_id, Home(other.node_id, name))
    shapes = [_shape(name) for name in volumes]
    reported = [
        (-one.at_ms, node_id, one.volume)
        for node_id, some in index.of((service_name, task.slot)).items()
        for one in some
        if any(_is_named(one.volume, shape) for shape in shapes)
        and not index.is_forgotten(node_id, one.volume, one.at_ms)
    ]
    for _, node_id, volume in sorted(reported):
        found.setdefault(node_id, Home(node_id, volume))
    return tuple(found.values())


def _had_volumes(task: Task) -> bool:
    """Whether the task came so far on its node that its volumes were made."""
    state = task.status.state
    return bool(task.node_id) and state >= TaskState.READY and state is not TaskState.REJECTED


def may_be(volume: str, name: str) -> bool:
    """Whether ``name``, perhaps with placeholders, may have become the name ``volume``."""
    return bool(name) and _is_named(volume, _shape(name))


def _shape(name: str) -> _Shape:
    """What every name that ``name``, perhaps with placeholders, may become begins and ends with."""
    if "{{" not in name:
        return name, None
    begin, end = name.index("{{"), name.rfind("}}") + 2
    return (name[:begin], name[end:]) if end >= begin + 4 else (name, "")


def _is_named(volume: str, shape: _Shape) -> bool:
    first, last = shape
    if last is None:
        return volume == first
    return len(volume) >= len(first) + len(last) and volume.startswith(first) and volume.endswith(last)
