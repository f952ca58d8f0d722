"""Merges Compose files after converting short forms into long ones.

Mappings are merged, lists are joined, and other values are replaced, except for the keys in this module's tables.
``!reset`` removes a value, and ``!override`` replaces it as a whole.

Source: compose-spec, 13-merge.md; compose-go, override/merge.go.
"""

import posixpath
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from msgspec.structs import replace

from skep.stack.compose.document import YamlNode, mapping, scalar

_PAIRS: Final = (
    "environment",
    "labels",
    "annotations",
    "sysctls",
    "extra_hosts",
    "args",
    "additional_contexts",
)
"""Keys of a service, its ``deploy`` and its ``build`` that may hold a list of ``NAME=VALUE`` instead of a mapping."""
_NAMES: Final = ("networks", "depends_on")
"""Keys that may hold a list of names instead of a mapping."""
_ONE_OR_LIST: Final = ("dns", "dns_search", "dns_opt", "env_file", "tmpfs", "label_file")
_REPLACED: Final = ("command", "entrypoint", "test")
_PORT: Final = re.compile(
    r"(?:(?P<ip>[0-9]+\.[0-9.]+|\[[0-9a-fA-F:.]+\]):)?(?:(?P<published>[0-9-]*):)?(?P<target>[0-9-]+)(?:/(?P<protocol>\w+))?"
)


def canonical(document: YamlNode) -> YamlNode:
    """Return the document with long forms in place of the short forms that merging cannot handle."""
    services = (document.entries or {}).get("services")
    if services is None or services.entries is None:
        return document
    made = {name: _canonical_service(one) for name, one in services.entries.items()}
    return _with(document, "services", replace(services, value=made))


def _with(node: YamlNode, key: str, value: YamlNode) -> YamlNode:
    return replace(node, value={**(node.entries or {}), key: value})


def _canonical_service(service: YamlNode) -> YamlNode:
    entries = service.entries
    if entries is None:
        return service
    made = dict(entries)
    if (build := made.get("build")) is not None and isinstance(build.value, str):
        made["build"] = mapping({"context": build}, build.place)
    for key in ("build", "deploy"):
        inner = made.get(key)
        if inner is not None and inner.entries is not None:
            made[key] = replace(
                inner, value={name: _as_mapping(name, one) for name, one in inner.entries.items()}
            )
    for key, node in made.items():
        if key in _NAMES and node.items is not None:
            made[key] = _named(node)
        elif key in _ONE_OR_LIST and isinstance(node.value, str):
            made[key] = replace(node, value=(replace(node, tag=""),), text="")
        else:
            made[key] = _as_mapping(key, node)
    return replace(service, value=made)


def _as_mapping(key: str, node: YamlNode) -> YamlNode:
    """Return a list of ``NAME=VALUE`` as a mapping, and other nodes unchanged."""
    if key not in _PAIRS or node.items is None or not all(isinstance(one.value, str) for one in node.items):
        return node
    made: dict[str, YamlNode] = {}
    for one in node.items:
        separators = "=:" if key == "extra_hosts" else "="
        at = min((at for at in map(one.text.find, separators) if at > 0), default=-1)
        name = one.text if at < 0 else one.text[:at]
        value = YamlNode(None, one.place) if at < 0 else scalar(one.text[at + 1 :], one.place)
        if key == "extra_hosts" and name in made:
            before = made[name]
            value = replace(before, value=(*(before.items or (before,)), value), text="")
        made[name] = value
    return replace(node, value=made, keys={name: one.place for name, one in made.items()})


def _named(node: YamlNode) -> YamlNode:
    names = [one for one in node.items or () if isinstance(one.value, str)]
    if len(names) != len(node.items or ()):
        return node
    return replace(
        node,
        value={one.text: YamlNode(None, one.place) for one in names},
        keys={one.text: one.place for one in names},
    )


def merged(base: YamlNode, above: YamlNode, path: tuple[str, ...] = ()) -> YamlNode | None:
    """Return ``base`` merged with ``above``, which takes precedence, or None if ``above`` removes it."""
    if above.tag == "!reset":
        return None
    if above.tag == "!override":
        return replace(above, tag="")
    key = path[-1] if path else ""
    if above.value is None:
        return base if base.entries is not None or base.items is not None else above
    if base.entries is not None and above.entries is not None:
        if key == "logging" and _differs(base.entries, above.entries, "driver"):
            return above
        return _merged_mapping(base, above, path)
    if base.items is not None and above.items is not None and key not in _REPLACED:
        return _joined(base, above, key)
    return above


def _differs(base: Mapping[str, YamlNode], above: Mapping[str, YamlNode], key: str) -> bool:
    return key in base and key in above and base[key].text != above[key].text


def _merged_mapping(base: YamlNode, above: YamlNode, path: tuple[str, ...]) -> YamlNode:
    assert base.entries is not None
    assert above.entries is not None
    made, keys = dict(base.entries), {**base.keys, **above.keys}
    for key, node in above.entries.items():
        one = merged(made[key], node, (*path, key)) if key in made else without_tags(node)
        if one is None:
            made.pop(key, None)
        else:
            made[key] = one
    return replace(above, value=made, keys=keys)


def without_tags(node: YamlNode) -> YamlNode | None:
    """Return the tree without the values that ``!reset`` removes, or None if it removes the tree itself."""
    if node.tag == "!reset":
        return None
    if node.entries is not None:
        kept = {key: one for key, below in node.entries.items() if (one := without_tags(below)) is not None}
        return replace(node, value=kept, tag="")
    if node.items is not None:
        return replace(
            node, value=tuple(one for below in node.items if (one := without_tags(below)) is not None), tag=""
        )
    return replace(node, tag="") if node.tag else node


def _joined(base: YamlNode, above: YamlNode, key: str) -> YamlNode:
    """Return both lists joined.  A later item replaces an earlier item with the same identity."""
    identity = _IDENTITIES.get(key, _itself)
    made: dict[object, YamlNode] = {}
    for one in (*(base.items or ()), *(above.items or ())):
        kept = without_tags(one)
        if kept is not None:
            name = identity(kept)
            before = made.get(name)
            both = before is not None and before.entries is not None and kept.entries is not None
            made[name] = _merged_mapping(before, kept, ()) if both and before is not None else kept
    return replace(above, value=tuple(made.values()))


def _itself(node: YamlNode) -> object:
    return node.text if node.entries is None and node.items is None else id(node)


def _field(node: YamlNode, *names: str) -> str:
    return next((node.entries[name].text for name in names if node.entries and name in node.entries), "")


def _target(node: YamlNode) -> object:
    """Return a volume mount's target."""
    if node.entries is not None:
        return _field(node, "target")
    parts = node.text.split(":")
    return parts[1] if len(parts) > 1 else parts[0]


def _file_in(directory: str, node: YamlNode) -> object:
    """Return the path of a secret or config in the container.  A relative path is below ``directory``."""
    return posixpath.join(
        directory, _field(node, "target", "source") if node.entries is not None else node.text
    )


def _path(node: YamlNode) -> object:
    """Return the path of an environment file."""
    return _field(node, "path") if node.entries is not None else node.text


def _port(node: YamlNode) -> object:
    if node.entries is not None:
        return (
            *(_field(node, key) for key in ("host_ip", "target", "published")),
            _field(node, "protocol") or "tcp",
        )
    match = _PORT.fullmatch(node.text)
    return (
        node.text
        if match is None
        else (match["ip"] or "", match["target"], match["published"] or "", match["protocol"] or "tcp")
    )


def _device(node: YamlNode) -> object:
    return _field(node, "target", "source") if node.entries is not None else (node.text.split(":") * 2)[1]


_IDENTITIES: Final[Mapping[str, Callable[[YamlNode], object]]] = {
    "volumes": _target,
    "ports": _port,
    "secrets": partial(_file_in, "/run/secrets"),
    "configs": partial(_file_in, "/"),
    "env_file": _path,
    "devices": _device,
}
