"""Local volumes with data of a service's slots, and the nodes that have them.

A node reports in an engine label which slots have used its volumes, so that managers know it after the tasks are
removed and while the node is down.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.model.container import Mount
from skep.model.node import Node, NodeDescription
from skep.model.service import TaskSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import MILLISECOND_NS, unix_ns

SLOT_VOLUMES_LABEL: Final = "skep.slot-volumes"
FORGOTTEN_LABEL: Final = "skep.forgotten-volumes"
"""Label of a node's spec with its local volumes that were given up while it was down, each with the time up to which
its use counts as forgotten."""
FORGOTTEN_MAX: Final = 500
"""Forgotten volumes that a service remembers."""
LABEL_CHARACTERS_MAX: Final = 32 * 1024
"""Characters of a node's label that are read.  Nodes are not trusted."""
_WORD = re.compile(r"([a-zA-Z0-9][\w.-]+)=([a-zA-Z0-9][\w-]*)\.([0-9]{1,9})@([0-9]{1,15})", re.ASCII)
_FORGOTTEN = re.compile(r"([a-zA-Z0-9][\w.-]+)@([0-9]{1,15})", re.ASCII)
"""The names hold times in milliseconds, which keeps them short."""
_LOCATING = ("type", "device")
"""Options of a volume that locate its data, perhaps on another machine."""

SlotName: TypeAlias = tuple[str, int]
"""A service's name and the number of a slot as nodes know it (``Task.shown_slot``)."""


_Shape: TypeAlias = tuple[str, str | None]
"""Prefix and suffix of possible names.  Without a suffix (None), the prefix is the only name."""


class SlotVolume(msgspec.Struct, frozen=True, gc=False):
    """A volume that a slot's tasks have used on a node.

    ``slot`` is the number that nodes know (``Task.shown_slot``), and ``at_ms`` the creation time of the last such task,
    Unix time.
    """

    volume: str
    service: str
    slot: int
    at_ms: int


class Home(msgspec.Struct, frozen=True, gc=False):
    """A node with a slot's data, and the volume with the data."""

    node_id: NodeId
    volume: str


def created_ms(task: Task) -> int:
    """Return the task's creation time in Unix milliseconds, by a manager's clock."""
    return unix_ns(task.created_at) // MILLISECOND_NS


def slot_user(service_name: str, task: Task) -> str:
    """Return ``service.slot`` for a task as its node knows it (``Task.shown_slot``), or an empty text without a slot.

    Slot 0 is the first slot of a job.  A node cannot distinguish it from a task of a global job, for which managers
    ignore the reports.
    """
    has_slot = bool(task.slot) or task.job_iteration is not None
    return f"{service_name}.{task.slot}" if has_slot else ""


def slot_volumes_label(found: Iterable[SlotVolume]) -> str:
    """Return the label ``data=web.2@1763894400000 ...`` for volumes, with as many of the latest as fit."""
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
    """Return whether a node's description has changed in more than the slots that have used its volumes.

    The slots change with the node's own tasks, and do not decide whether a running task may stay there.
    """
    return differ_beyond_slots(before.description, after.description)


def differ_beyond_slots(one: NodeDescription, other: NodeDescription) -> bool:
    """Return whether two descriptions of a node differ in more than the slots that have used its volumes."""
    if one == other:
        return False
    if one.engine.labels == other.engine.labels:
        return True
    return _without_slots(one) != _without_slots(other)


def differ_in_slots_alone(before: Node, after: Node) -> bool:
    """Return whether a node differs only in the slots that have used its volumes, and perhaps in its load."""
    is_other = before.description != after.description and not has_other_properties(before, after)
    return is_other and replace(before, description=after.description, load=after.load) == after


def _without_slots(description: NodeDescription) -> NodeDescription:
    labels = {name: value for name, value in description.engine.labels.items() if name != SLOT_VOLUMES_LABEL}
    return replace(description, engine=replace(description.engine, labels=labels))


def slot_volumes_of(node: Node) -> list[SlotVolume]:
    """Return the volumes in the node's label; invalid parts are ignored."""
    return slot_volumes_in(node.description.engine.labels.get(SLOT_VOLUMES_LABEL, ""))


def slot_volumes_in(label: str) -> list[SlotVolume]:
    """Return the volumes in such a label; invalid parts are ignored."""
    matches = (_WORD.fullmatch(word) for word in label[:LABEL_CHARACTERS_MAX].split())
    return [SlotVolume(one[1], one[2], int(one[3]), int(one[4])) for one in matches if one is not None]


def forgotten_label(forgotten: Mapping[str, int]) -> str:
    """Return the label ``data@1763894400000 ...`` for the latest forgotten volumes."""
    latest = sorted(forgotten.items(), key=lambda item: (-item[1], item[0]))[:FORGOTTEN_MAX]
    return " ".join(f"{name}@{at_ms}" for name, at_ms in latest)


def forgotten_in(label: str) -> dict[str, int]:
    """Return the time up to which use is forgotten, by volume; invalid parts are ignored."""
    matches = (_FORGOTTEN.fullmatch(word) for word in label[:LABEL_CHARACTERS_MAX].split())
    return {one[1]: int(one[2]) for one in matches if one is not None}


def local_volumes(spec: TaskSpec) -> tuple[str, ...]:
    """Return the names of volumes whose data stays on the node, as in the spec, perhaps with placeholders."""
    mounts = spec.container_spec.mounts if spec.container_spec is not None else ()
    return tuple(mount.source for mount in mounts if _is_local(mount)) if mounts else ()


def _is_local(mount: Mount) -> bool:
    driver = mount.volume_options.driver_config if mount.volume_options is not None else None
    if mount.type not in ("volume", "") or not mount.source:
        return False
    return driver is None or (
        driver.name in ("", "local") and not any(driver.options.get(name) for name in _LOCATING)
    )


class SlotVolumeIndex:
    """An index of the nodes that report volumes of a slot."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._labels: dict[NodeId, str] = {}
        self._slots: dict[NodeId, tuple[SlotName, ...]] = {}
        self.by_slot: dict[SlotName, dict[NodeId, Sequence[SlotVolume]]] = {}
        self._forgotten: dict[NodeId, Mapping[str, int]] = {}
        for node in nodes:
            self.set_node(node)

    def set_node(self, node: Node) -> Collection[SlotName]:
        """Add or update a node, and return the slots whose reported volumes have changed."""
        if forgotten := forgotten_in(node.spec.labels.get(FORGOTTEN_LABEL, "")):
            self._forgotten[node.id] = forgotten
        else:
            self._forgotten.pop(node.id, None)
        label = node.description.engine.labels.get(SLOT_VOLUMES_LABEL, "")
        if label == self._labels.get(node.id, ""):
            return ()
        before = {slot: self.by_slot[slot][node.id] for slot in self._slots.get(node.id, ())}
        self._remove_label(node.id)
        self._labels[node.id] = label
        by_slot: dict[SlotName, list[SlotVolume]] = {}
        for one in slot_volumes_of(node):
            by_slot.setdefault((one.service, one.slot), []).append(one)
        for slot, found in by_slot.items():
            self.by_slot.setdefault(slot, {})[node.id] = found
        self._slots[node.id] = tuple(by_slot)
        return {slot for slot in {*before, *by_slot} if before.get(slot) != by_slot.get(slot)}

    def remove_node(self, node_id: NodeId) -> None:
        """Remove a node with its volumes."""
        self._forgotten.pop(node_id, None)
        self._remove_label(node_id)

    def _remove_label(self, node_id: NodeId) -> None:
        if self._labels.pop(node_id, None) is None:
            return
        for slot in self._slots.pop(node_id):
            nodes = self.by_slot[slot]
            del nodes[node_id]
            if not nodes:
                del self.by_slot[slot]

    def is_forgotten(self, node_id: NodeId, name: str, at_ms: int) -> bool:
        """Return whether use of a volume at that time is forgotten.  ``name`` may have placeholders."""
        forgotten = self._forgotten.get(node_id)
        if not forgotten:
            return False
        shape = shape_of(name)
        return any(at_ms <= until_ms and _is_named(volume, shape) for volume, until_ms in forgotten.items())

    def of(self, slot: SlotName) -> Mapping[NodeId, Sequence[SlotVolume]]:
        """Return the volumes of a slot that nodes report, by node."""
        return self.by_slot.get(slot, _NONE)


_NONE: Mapping[NodeId, Sequence[SlotVolume]] = MappingProxyType({})


def homes_of(task: Task, service_name: str, past: Iterable[Task], index: SlotVolumeIndex) -> tuple[Home, ...]:
    """Return the nodes with local volumes of the task's slot, latest data first.

    ``past``: earlier tasks of the slot.  They take precedence over reports, so a node cannot attract the tasks of a
    slot with a history by false reports.
    """
    volumes = local_volumes(task.spec)
    if not volumes or not task.slot:
        return ()
    found: dict[NodeId, Home] = {}
    for other in sorted((one for one in past if had_volumes(one)), key=created_ms, reverse=True):
        shared = next((one for one in local_volumes(other.spec) if one in volumes), None)
        if other.id != task.id and shared is not None:
            # Docker replaces the placeholder by the node's id for slot 0 of a job.
            name = shared.replace("{{.Task.Slot}}", str(task.shown_slot or other.node_id))
            if index.is_forgotten(other.node_id, name, created_ms(other)):
                continue
            found.setdefault(other.node_id, Home(other.node_id, name))
    shapes = [shape_of(name) for name in volumes]
    reported = [
        (-one.at_ms, node_id, one.volume)
        for node_id, some in index.of((service_name, task.shown_slot)).items()
        for one in some
        if any(_is_named(one.volume, shape) for shape in shapes)
        and not index.is_forgotten(node_id, one.volume, one.at_ms)
    ]
    for _, node_id, volume in sorted(reported):
        found.setdefault(node_id, Home(node_id, volume))
    return tuple(found.values())


def had_volumes(task: Task) -> bool:
    """Return whether the task's container, and with it the task's volumes, was created on its node.

    A task that was stopped or rejected may have ended before that.  Only a container ID shows that it did not.
    """
    status = task.status
    if not task.node_id:
        return False
    if TaskState.READY <= status.state < TaskState.SHUTDOWN or status.state is TaskState.FAILED:
        return True
    return status.container_status is not None and bool(status.container_status.container_id)


def may_be(volume: str, name: str) -> bool:
    """Return whether ``name``, perhaps with placeholders, may expand to the name ``volume``."""
    return bool(name) and _is_named(volume, shape_of(name))


def names_there(
    names: Iterable[str], found: Iterable[SlotVolume], users: Collection[SlotName]
) -> tuple[str, ...]:
    """Return the volumes that ``names`` are for ``users`` on a node, whose reported volumes ``found`` are.

    A name with placeholders stays as it is if the node reports no such volume, perhaps because it has only begun.
    """
    theirs = sorted({one.volume for one in found if (one.service, one.slot) in users})
    there: list[str] = []
    for name in names:
        there += ("{{" in name and [one for one in theirs if may_be(one, name)]) or [name]
    return tuple(there)


def shape_of(name: str) -> _Shape:
    """Return the prefix and suffix of all names to which ``name``, perhaps with placeholders, may expand."""
    if "{{" not in name:
        return name, None
    begin, end = name.index("{{"), name.rfind("}}") + 2
    return (name[:begin], name[end:]) if end >= begin + 4 else (name, "")


def _is_named(volume: str, shape: _Shape) -> bool:
    first, last = shape
    if last is None:
        return volume == first
    return len(volume) >= len(first) + len(last) and volume.startswith(first) and volume.endswith(last)
