"""Selects the containers that ``docker ps`` shows.  Pure.

Source: moby 20.10, daemon/list.go.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from skep.api.errors import Untranslated
from skep.api.formats.filters import Filters
from skep.engine.api.responses.network_settings import networks
from skep.engine.containers.container import Container, ContainerState
from skep.engine.images.digest import Digest, hex_of
from skep.engine.images.reference import Reference, parse_any
from skep.errors import InvalidArgument
from skep.model.options.labels import LABEL_TASK_ID

FILTERS = (
    *("ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label", "name"),
    *("network", "publish", "since", "status", "volume"),
)
_STATES = frozenset({*(state.value for state in ContainerState), "restarting", "dead"})
_HEALTH = frozenset({"none", "starting", "healthy", "unhealthy"})
_REPETITIONS_MAX = 3
"""Limit for the repetitions in a pattern.  More could keep Python's matcher busy for a long time."""


class ListingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the request."""

    filters: Filters
    all: bool = False
    limit: int = 0
    """Maximum number of containers, or 0 for no limit."""
    ancestors: frozenset[str] | None = None
    """Ids of the wanted images, or None for any."""
    network_ids: Mapping[str, str] = {}
    """Ids of the predefined networks by name."""


def ancestors(words: Sequence[str], image_id: Callable[[str], str]) -> frozenset[str] | None:
    """Return the ids of the images in an ``ancestor`` filter.  Names without an image are ignored.

    Args:
        image_id: Returns the id of the image with a name, or an empty string.
    """
    if not words:
        return None
    return frozenset(filter(None, map(image_id, words)))


def image_id_among(containers: Sequence[Container]) -> Callable[[str], str]:
    """Return the function ``image_id`` for users who may not see the node's images.

    Only images of ``containers`` are known: by id, prefix of an id, or the name with which a container was created.
    """

    by_name = {name: one.image_id for one in containers for name in _full_names(one.image)}

    def image_id(word: str) -> str:
        digits = word.removeprefix("sha256:")
        ids = {one.image_id for one in containers if digits and hex_of(one.image_id).startswith(digits)}
        named = (by_name[name] for name in _full_names(word)[:1] if name in by_name)
        return next(named, ids.pop() if len(ids) == 1 else "")

    return image_id


def _full_names(word: str) -> Sequence[str]:
    """Return the full names of an image: the decisive name first, then the other names in ``word``."""
    try:
        named = parse_any(word)
    except InvalidArgument:
        return ()
    if not isinstance(named, Reference):
        return (named,)
    by_tag = replace(named, digest=Digest("")).with_default_tag()
    if not named.digest:
        return (str(by_tag),)
    return (str(named.with_digest(named.digest)), *([str(by_tag)] if named.tag else []))


def select(containers: Sequence[Container], selection: ListingOptions) -> Sequence[Container]:
    """Return the containers that match ``selection``, in the given order (newest first).

    Raises: InvalidArgument: a filter's value is invalid.
    """
    filters = selection.filters
    _check(filters)
    exits = _exit_codes(filters)
    name_is, id_is = _patterns(filters["name"]), _patterns(filters["id"])
    shows_all = selection.all or selection.limit > 0 or "status" in filters
    found = []
    for container in _between(containers, filters):
        if (
            (shows_all or container.is_active)
            and name_is(container.name, f"/{container.name}")
            and id_is(container.id)
            and filters.matches("status", container.status)
            and filters.matches("health", container.health.status.value if container.health else "none")
            and filters.matches_labels("label", container.labels)
            and (exits is None or (container.exit_code in exits and container.status == "exited"))
            and (selection.ancestors is None or container.image_id in selection.ancestors)
            and _is_task(container, filters["is-task"])
            and _matches_volume(container, filters["volume"])
            and (
                "network" not in filters
                or filters.matches("network", *_networks(container, selection.network_ids))
            )
            and filters.matches("isolation", "default", "")
            and _matches_ports(filters["publish"], _published(container))
            and _matches_ports(filters["expose"], container.config.exposed_ports)
        ):
            found.append(container)
            if selection.limit > 0 and len(found) == selection.limit:
                break
    return found


def _check(filters: Filters) -> None:
    filters.refuse_unknown(*FILTERS)
    for value in filters["status"]:
        if value not in _STATES:
            raise InvalidArgument(f"Invalid filter 'status={value}'")
    for value in filters["health"]:
        if value not in _HEALTH:
            raise InvalidArgument(f"Unrecognised filter value for health: {value}")
    tasks = filters["is-task"]
    if tasks and tasks not in (("true",), ("1",), ("false",), ("0",)):
        raise InvalidArgument(f"Invalid filter 'is-task=[{' '.join(tasks)}]'")


def _exit_codes(filters: Filters) -> frozenset[int] | None:
    if "exited" not in filters:
        return None
    for value in filters["exited"]:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", value, re.ASCII):
            raise Untranslated(f'strconv.Atoi: parsing "{value}": invalid syntax')
    return frozenset(int(value) for value in filters["exited"])


def _between(containers: Sequence[Container], filters: Filters) -> Sequence[Container]:
    """Return the containers older than ``before`` and newer than ``since``.  ``containers`` has the newest first."""
    start, end = 0, len(containers)
    if filters["before"]:
        start = _position(containers, filters["before"][-1]) + 1
    if filters["since"]:
        end = _position(containers, filters["since"][-1])
    return containers[start:end]


def _position(containers: Sequence[Container], word: str) -> int:
    for number, container in enumerate(containers):
        if word in (container.name, f"/{container.name}") or container.id.startswith(word or "-"):
            return number
    raise Untranslated(f"no such container {word}")


def _patterns(values: Collection[str]) -> Callable[..., bool]:
    """Return a function that tells whether a name contains or equals one of the patterns."""
    if not values:
        return lambda *_: True
    expressions = [_pattern(value) for value in values]
    return lambda *names: any(expression.search(name) for expression in expressions for name in names)


def _pattern(value: str) -> re.Pattern[str]:
    """Compile a regular expression.  An invalid or potentially slow one matches its literal text instead."""
    is_simple = (
        not re.search(r"\)[*+?{]|\(\?", value) and len(re.findall(r"[*+{]", value)) <= _REPETITIONS_MAX
    )
    if is_simple and len(value) <= 1024:
        try:
            return re.compile(value, re.ASCII)
        except (re.error, OverflowError, RecursionError):
            pass
    return re.compile(re.escape(value))


def _is_task(container: Container, wanted: Sequence[str]) -> bool:
    return not wanted or (LABEL_TASK_ID in container.labels) == (wanted[0] in ("true", "1"))


def _matches_volume(container: Container, wanted: Sequence[str]) -> bool:
    mounts = container.config.mounts
    return not wanted or any(value in (mount.name, mount.destination) for value in wanted for mount in mounts)


def _networks(container: Container, network_ids: Mapping[str, str]) -> Sequence[str]:
    endpoints = container.sandbox.endpoints if container.sandbox is not None else ()
    names = networks(container, network_ids)
    known = [network_ids[name] for name in names if name in network_ids]
    return [*names, *known, *(one.network_id for one in endpoints)]


def _published(container: Container) -> Sequence[str]:
    ports = container.sandbox.ports if container.sandbox else ()
    return [
        f"{number}/{port.protocol}" for port in ports for number in (port.published_port, port.target_port)
    ]


def _matches_ports(wanted: Sequence[str], found: Sequence[str]) -> bool:
    return not wanted or any((value if "/" in value else f"{value}/tcp") in found for value in wanted)
