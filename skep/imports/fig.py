"""Converts ``fig.yml`` of 2014 and Compose files of version 1, which have the same form: services at the top, links.

Source: docs.docker.com, compose-file version 1 reference; compose-spec, "Legacy versions".
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.imports.document import Imported, Note, accepted
from skep.stack.compose.document import FilePosition, FileProblem, FileProblems, YamlNode, parse
from skep.stack.project import NODES_NETWORKS

_MACHINE_PATH: Final = re.compile(r"[./~]")


def imported(text: str, file: str, stack: str) -> Imported:
    """Convert a file of version 1 to a stack file.  Raises: FileProblems: the file has another version."""
    document = parse(text, file)
    services = {name: _plain(node) for name, node in _services(document, file).items()}
    notes: list[Note] = []
    made: dict[str, Any] = {"name": stack, "services": {}}
    conversion = _Conversion(services, notes)
    for name in services:
        made["services"][name] = conversion.service(name)
    for name, aliases in conversion.aliases.items():
        made["services"][name]["networks"] = {"default": {"aliases": sorted(aliases)}}
    volumes = conversion.volumes | {
        name: conversion.volumes.get(name) for name in _named_volumes(made["services"])
    }
    if volumes:
        made["volumes"] = dict(sorted(volumes.items()))
    result = accepted(made)
    return replace(result, notes=(*notes, *result.notes))


def _services(document: YamlNode, file: str) -> Mapping[str, YamlNode]:
    entries = document.entries
    if not entries:
        raise FileProblems([FileProblem(FilePosition(file, 1, 1), "", "there are no services in this file")])
    if "services" in entries or "version" in entries:
        key = "version" if "version" in entries else "services"
        place = document.keys.get(key, document.place)
        text = "this file is not a Compose file of version 1. Deploy it unchanged with skep stack deploy."
        raise FileProblems([FileProblem(place, key, text)])
    for name, node in entries.items():
        if node.entries is None or not ({"image", "build", "extends"} & node.entries.keys()):
            place = document.keys.get(name, node.place)
            raise FileProblems(
                [FileProblem(place, name, "a service of version 1 needs image, build or extends")]
            )
    return entries


def _plain(node: YamlNode) -> dict[str, Any]:
    """Return the tree with scalars as written in the file: ``1.10`` stays ``1.10``."""
    found = _as_written(node)
    assert isinstance(found, dict)
    return found


def _as_written(node: YamlNode) -> Any:
    if (entries := node.entries) is not None:
        return {key: _as_written(one) for key, one in entries.items()}
    if (items := node.items) is not None:
        return [_as_written(one) for one in items]
    return node.text if isinstance(node.value, float) else node.value


class _Conversion:
    """The conversion of one file.  ``service`` is called for each of its services."""

    def __init__(self, services: Mapping[str, dict[str, Any]], notes: list[Note]) -> None:
        self._services = services
        self._notes = notes
        self.aliases: dict[str, set[str]] = {}
        """Additional names of services, from links."""
        self.volumes: dict[str, dict[str, Any] | None] = {}
        """Volumes without a declaration, because version 1 created them at first use."""
        for service in services.values():
            for text in _texts(service.get("volumes_from")):
                self._name_volumes(text.partition(":")[0])

    def service(self, name: str) -> dict[str, Any]:
        """Return the service in the form of the present specification."""
        old = dict(self._services[name])
        made: dict[str, Any] = {}
        if "build" in old or "dockerfile" in old:
            made["build"] = self._build(old.pop("build", "."), old.pop("dockerfile", ""))
        depends_on = list(self._links(name, old.pop("links", ())))
        if driver := old.pop("volume_driver", ""):
            self._driven(_texts(old.get("volumes")), str(driver))
        if "volumes_from" in old:
            volumes = [*_texts(old.get("volumes")), *self._volumes_from(name, old.pop("volumes_from"))]
            old["volumes"] = list(dict.fromkeys(volumes))
        if net := old.pop("net", ""):
            self._net(name, str(net), made)
        if "log_driver" in old or "log_opt" in old:
            logging = {"driver": old.pop("log_driver", None), "options": old.pop("log_opt", None)}
            made["logging"] = {key: one for key, one in logging.items() if one}
        made |= old
        if depends_on:
            made["depends_on"] = depends_on
        return made

    def _build(self, context: Any, dockerfile: Any) -> Any:
        return {"context": context, "dockerfile": dockerfile} if dockerfile else context

    def _links(self, name: str, links: Any) -> Iterator[str]:
        for text in _texts(links):
            target, _, alias = text.partition(":")
            if target not in self._services:
                self._notes.append(Note(f"services.{name}.links", f"dropped: {target} is not in this file"))
                continue
            if alias and alias != target:
                self.aliases.setdefault(target, set()).add(alias)
                text = f"all services of the stack now reach {target} as {alias}, not only this one"
                self._notes.append(Note(f"services.{name}.links", text))
            yield target

    def _volumes_from(self, name: str, sources: Any) -> Iterator[str]:
        for text in _texts(sources):
            source, _, mode = text.partition(":")
            if source == "container" or source not in self._services:
                problem = f"dropped: {text!r} is not a service in this file"
                self._notes.append(Note(f"services.{name}.volumes_from", problem))
                continue
            shared = _texts(self._services[source].get("volumes"))
            if nested := self._services[source].get("volumes_from"):
                problem = f"dropped: the volumes that {source} has from {nested}"
                self._notes.append(Note(f"services.{name}.volumes_from", problem))
            places = "a volume is on one node: add placement constraints, so that all tasks that share it run there"
            self._notes.append(Note(f"services.{name}.volumes_from", places))
            yield from (_with_mode(volume, mode) for volume in shared)

    def _name_volumes(self, source: str) -> None:
        """Give names to the unnamed volumes of a service, so that other services can mount them."""
        if volumes := _texts(self._services.get(source, {}).get("volumes")):
            self._services[source]["volumes"] = [
                volume if ":" in volume else f"{source}{volume}".replace("/", "-").strip("-") + f":{volume}"
                for volume in volumes
            ]

    def _driven(self, volumes: list[str], driver: str) -> None:
        for volume in volumes:
            if named := _volume_name(volume):
                self.volumes[named] = {"driver": driver}

    def _net(self, name: str, net: str, made: dict[str, Any]) -> None:
        if net in NODES_NETWORKS:
            made["network_mode"] = net
            return
        text = f"dropped: a service cannot use the network of {net}. Connect both to a common network"
        self._notes.append(Note(f"services.{name}.net", text))


def _texts(found: Any) -> list[str]:
    """Return a list of texts.  A single text becomes a list of one."""
    if found is None:
        return []
    if isinstance(found, list | tuple):
        return [str(one) for one in found]
    if isinstance(found, dict):
        raise InvalidArgument(f"expected a list, not the mapping {found}")
    return [str(found)]


def _volume_name(volume: str) -> str:
    """Return the name of a mount's volume, or an empty text for a host path or an unnamed volume."""
    source, separator, _ = volume.partition(":")
    return source if separator and not _MACHINE_PATH.match(source) else ""


def _named_volumes(services: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    for service in services.values():
        yield from filter(None, map(_volume_name, _texts(service.get("volumes"))))


def _with_mode(volume: str, mode: str) -> str:
    source, target, *_ = volume.split(":")
    return f"{source}:{target}:{mode}" if mode else volume
