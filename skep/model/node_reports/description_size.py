"""Limits the size of a node's description, which is one value in the store and one message on the wire.

Each part has its own limit, but all parts together may still be too large.  They are then cut in a fixed order.  Ports
in use come first, because without them a task only fails once and is placed elsewhere.  Devices follow, then the
locations of data, and last the labels and drivers that placement needs.  A node condition names the cut parts.  No node
is refused because of the size.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from msgspec.structs import replace

from skep.model.networks.data_planes import NODE_LABEL
from skep.model.networks.routes import ROUTES_LABEL
from skep.model.networks.used_ports import PORTS_LABEL, shortened_ports
from skep.model.node import EngineDescription, NodeDescription
from skep.model.node_reports.conditions import (
    CHARACTERS_MAX,
    CONDITIONS_MAX,
    ConditionName,
    condition_label,
    is_condition,
)
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.permissions.rights import CDI_LABEL, DEVICES_LABEL, MORE
from skep.model.service import Platform
from skep.model.values.encoding import to_json

DESCRIPTION_BYTES_MAX: Final = 64 << 10
"""Largest size of a description in JSON."""
_RESERVED_BYTES: Final = 1024
"""Bytes kept free for the condition, which is added after the cut."""
_NAME_CHARACTERS_MAX: Final = 255
"""Longest host name that DNS allows, used for other names as well."""

_Cut: TypeAlias = Callable[[str, int], str]
"""Shortens the value of a label to a number of bytes."""


def _shortened_list(value: str, size: int) -> str:
    kept = value.encode()[: max(size - len(MORE) - 1, 0)].decode(errors="ignore")
    return ",".join([*kept.split(",")[:-1], MORE])


def _shortened_words(value: str, size: int) -> str:
    kept = value.encode()[: max(size, 0)].decode(errors="ignore")
    return kept.rpartition(" ")[0]


_LABELS: Final[Sequence[tuple[str, str, _Cut]]] = (
    (PORTS_LABEL, "ports in use", shortened_ports),
    (DEVICES_LABEL, "devices", _shortened_list),
    (CDI_LABEL, "CDI devices", _shortened_list),
    (ROUTES_LABEL, "routes", _shortened_words),
    (SLOT_VOLUMES_LABEL, "slots with data in volumes", _shortened_words),
)
"""Labels in the order in which they are cut, each with its name for the condition and the function that shortens it."""


def within_size(description: NodeDescription) -> NodeDescription:
    """Return ``description``, cut to ``DESCRIPTION_BYTES_MAX`` if it is larger, with a condition about the cut."""
    if len(to_json(description)) <= DESCRIPTION_BYTES_MAX:
        return description
    return _Cutting(description).cut()


def size_condition(description: NodeDescription) -> str:
    """Return the condition of a cut description, or an empty text."""
    return description.engine.labels.get(condition_label(ConditionName.DESCRIPTION_SIZE), "")


class _Cutting:
    """A description while it is being cut."""

    def __init__(self, description: NodeDescription) -> None:
        self._description = description
        self._words: list[str] = []

    def cut(self) -> NodeDescription:
        for step in (self._cut_known_labels, self._drop_labels, self._drop_lists, self._cut_names):
            step()
            if self._excess() <= 0:
                break
        text = (
            f"this node's description is larger than {DESCRIPTION_BYTES_MAX >> 10} KiB: it was reported without some "
            f"{', '.join(self._words)}; reduce what the node has of these"
        )
        labels = dict(self._description.engine.labels)
        own = condition_label(ConditionName.DESCRIPTION_SIZE)
        for name in sorted(name for name in labels if is_condition(name) and name != own)[
            CONDITIONS_MAX - 1 :
        ]:
            del labels[
                name
            ]  # One of the ``CONDITIONS_MAX`` conditions that managers read has to be this one.
        return self._with_labels({**labels, own: text[:CHARACTERS_MAX]})

    def _excess(self) -> int:
        return len(to_json(self._description)) - (DESCRIPTION_BYTES_MAX - _RESERVED_BYTES)

    def _with_labels(self, labels: dict[str, str]) -> NodeDescription:
        engine = replace(self._description.engine, labels=labels)
        self._description = replace(self._description, engine=engine)
        return self._description

    def _cut_known_labels(self) -> None:
        """Shorten lists in the order of cutting, each only as far as needed."""
        for name, words, shortened in _LABELS:
            labels = dict(self._description.engine.labels)
            value, excess = labels.get(name, ""), self._excess()
            if not value or excess <= 0:
                continue
            labels[name] = shortened(value, len(value.encode()) - excess)
            # some characters are escaped in JSON
            if len(to_json(labels[name])) > len(to_json(value)) - excess:
                labels[name] = shortened(value, 0)
            self._words.append(words)
            self._with_labels(labels)

    def _drop_labels(self) -> None:
        """Drop other labels, the largest first.  Conditions are limited and stay."""
        labels = dict(self._description.engine.labels)
        conditions = sorted(name for name in labels if is_condition(name))
        for name in conditions[CONDITIONS_MAX:]:
            del labels[name]
        for name in conditions[:CONDITIONS_MAX]:
            labels[name] = labels[name][:CHARACTERS_MAX]
        self._with_labels(labels)
        others = [name for name in labels if name not in conditions and name != NODE_LABEL]
        excess, dropped = self._excess(), 0
        for name in sorted(others, key=lambda name: (-len(to_json((name, labels[name]))), name)):
            if excess <= 0:
                break
            excess -= len(to_json((name, labels[name]))) - 1
            del labels[name]
            dropped += 1
        if dropped:
            self._words.append(f"engine labels ({dropped})")
            self._with_labels(labels)

    def _drop_lists(self) -> None:
        """Drop drivers, plug-ins and generic resources from the end of their lists."""
        for words, size, shortened in (
            ("CSI drivers", len(self._description.csi_info), self._with_drivers),
            ("plug-ins", len(self._description.engine.plugins), self._with_plugins),
            (
                "generic resources",
                len(self._description.resources.generic_resources),
                self._with_generic_resources,
            ),
        ):
            if size and self._excess() > 0:
                self._words.append(words)
                while size and self._excess() > 0:
                    size //= 2
                    shortened(size)

    def _with_drivers(self, count: int) -> None:
        self._description = replace(self._description, csi_info=self._description.csi_info[:count])

    def _with_plugins(self, count: int) -> None:
        engine = self._description.engine
        self._description = replace(self._description, engine=replace(engine, plugins=engine.plugins[:count]))

    def _with_generic_resources(self, count: int) -> None:
        resources = self._description.resources
        kept = replace(resources, generic_resources=resources.generic_resources[:count])
        self._description = replace(self._description, resources=kept)

    def _cut_names(self) -> None:
        """Keep only the node's identification, with limited length."""
        one = self._description
        node_label = one.engine.labels.get(NODE_LABEL)
        self._words.append("names and certificates")
        self._description = NodeDescription(
            hostname=one.hostname[:_NAME_CHARACTERS_MAX],
            platform=Platform(
                architecture=one.platform.architecture[:_NAME_CHARACTERS_MAX],
                os=one.platform.os[:_NAME_CHARACTERS_MAX],
            ),
            resources=replace(one.resources, generic_resources=()),
            engine=EngineDescription(
                engine_version=one.engine.engine_version[:_NAME_CHARACTERS_MAX],
                labels={} if node_label is None else {NODE_LABEL: node_label[:_NAME_CHARACTERS_MAX]},
            ),
        )
