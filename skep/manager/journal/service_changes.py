"""The differences between two specs of a service, as phrases: images, numbers and names, never values.  Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from skep.model.container import ContainerSpec
from skep.model.service import ServiceSpec

_NAMES_MAX = 5
"""Names that one line lists."""
_NAMED = frozenset({"image", "env", "secrets", "configs", "labels"})


def spec_changes(old: ServiceSpec, new: ServiceSpec) -> Iterator[str]:
    """Yield one phrase per difference."""
    before, after = (one.task_template.container_spec or ContainerSpec() for one in (old, new))
    if before.image != after.image:
        yield f"image {_short(before.image, after.image)} → {_short(after.image, before.image)}"
    if old.mode.name != new.mode.name:
        yield f"mode {old.mode.name} → {new.mode.name}"
    elif old.mode.name == "replicated" and old.replicas != new.replicas:
        yield f"replicas {old.replicas} → {new.replicas}"
    yield from _phrase("environment", _variables(before.env), _variables(after.env))
    yield from _phrase(
        "secrets", *({one.secret_name: one for one in each.secrets} for each in (before, after))
    )
    yield from _phrase(
        "configs", *({one.config_name: one for one in each.configs} for each in (before, after))
    )
    yield from _phrase("labels", old.labels, new.labels)
    template = old.task_template, new.task_template
    if template[0].force_update != template[1].force_update:
        yield "all tasks will be replaced"
    others = [
        *_differing(before, after, _NAMED),
        *_differing(*template, {"container_spec", "force_update"}),
        *_differing(old, new, {"task_template", "mode", "labels"}),
    ]
    if others:
        yield f"changed: {', '.join(others)}"


def _short(image: str, other: str) -> str:
    """Return the image without its digest, unless only the digest differs."""
    name = image.partition("@")[0]
    return name if name != other.partition("@")[0] else image


def _variables(env: Iterable[str]) -> Mapping[str, Any]:
    return {name: value for name, _, value in (variable.partition("=") for variable in env)}


def _phrase(noun: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield a phrase such as ``environment +A -B ~C``, with added, removed and changed names."""
    marks = [f"+{name}" for name in after if name not in before]
    marks += [f"-{name}" for name in before if name not in after]
    marks += [f"~{name}" for name in after if name in before and before[name] != after[name]]
    if marks:
        more = f" and {len(marks) - _NAMES_MAX} more" if len(marks) > _NAMES_MAX else ""
        yield f"{noun} {' '.join(marks[:_NAMES_MAX])}{more}"


def _differing(old: Any, new: Any, said: Iterable[str]) -> list[str]:
    names = [name for name in old.__struct_fields__ if name not in said]
    return [name.replace("_", " ") for name in names if getattr(old, name) != getattr(new, name)]
