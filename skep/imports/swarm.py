"""Converts a running Docker Swarm to stack files, with the steps to move it."""

import base64
import binascii
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.api.client.client import ApiClient
from skep.errors import InvalidArgument
from skep.imports.document import Imported, Note, escaped
from skep.imports.inspected import imported, spec_in
from skep.model.options.labels import STACK_REVISION
from skep.model.service import ServiceSpec
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.unknown import Unknown

_RESPONSE_TIMEOUT_S: Final = 30.0
"""Seconds for one list of the other cluster."""
_FILE_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,99}")
REST: Final = "services"
"""Name of the stack for services without a stack, unless a stack already has this name."""
_START: Final = [
    "# Moving this swarm",
    "",
    "Read each step before you run it. The old swarm was not changed.",
    "",
    "## 1. Nodes",
    "",
    "Set up a cluster (`skep swarm init`, `skep swarm join`), then give its nodes what these had:",
    "",
]
_VOLUMES: Final = [
    "## 4. Volumes",
    "",
    "The data of a volume is on the node whose tasks used it: copy it before its service starts in the new cluster.",
    "",
]


class SwarmObjects(msgspec.Struct, frozen=True, kw_only=True):
    """The objects of a swarm, as its API shows them."""

    services: Sequence[Mapping[str, Any]] = ()
    networks: Sequence[Mapping[str, Any]] = ()
    secrets: Sequence[Mapping[str, Any]] = ()
    configs: Sequence[Mapping[str, Any]] = ()
    nodes: Sequence[Mapping[str, Any]] = ()


class SwarmExport(msgspec.Struct, frozen=True, kw_only=True):
    """``files`` are contents by path.  ``stacks`` are in the order in which to deploy them, by name."""

    files: Mapping[str, bytes]
    stacks: Mapping[str, Imported]


async def objects_of(client: ApiClient) -> SwarmObjects:
    """Read all objects of the swarm of ``client``.  Raises: SkepError: it is not a manager, or does not respond."""
    found = [
        await client.get(f"/{kind}", timeout_s=_RESPONSE_TIMEOUT_S)
        for kind in ("services", "networks", "secrets", "configs", "nodes")
    ]
    if not all(isinstance(one, list) for one in found):
        raise InvalidArgument("this is not the API of a swarm's manager")
    return SwarmObjects(**dict(zip(SwarmObjects.__struct_fields__, found, strict=True)))


def move_of(objects: SwarmObjects) -> SwarmExport:
    """Return stack files, the contents of configs, and a page with the steps."""
    objects = replace(objects, configs=[one for one in objects.configs if not _is_revision(one)])
    networks = {str(one["Id"]): one for one in objects.networks if one.get("Scope") == "swarm"}
    specs = [spec_in(service) for service in objects.services]
    rest = _free_name({spec.labels.get(STACK_LABEL, "") for spec, _ in specs})
    stacks: dict[str, list[tuple[ServiceSpec, Unknown]]] = {}
    for spec, unknown in specs:
        stacks.setdefault(spec.labels.get(STACK_LABEL) or rest, []).append((spec, unknown))
    renamed = {
        spec.name.lower(): f"{rest}_{spec.name.removeprefix(f'{rest}_')}" for spec, _ in stacks.get(rest, ())
    }
    contents, labels = dict(_contents(objects.configs)), _labels(objects.configs)
    made: dict[str, Imported] = {}
    files: dict[str, bytes] = {}
    for name, found in sorted(stacks.items()):
        if not _FILE_NAME.fullmatch(name):
            raise InvalidArgument(f"the stack {name!r} has a name that no file can have")
        made[name] = _with_configs(
            imported(sorted(found, key=lambda one: one[0].name), name, networks, renamed), contents, labels
        )
        files[f"{name}.yaml"] = made[name].text.encode()
    files |= {f"configs/{name}": content for name, content in contents.items()}
    files["MOVING.md"] = _page(objects, made, rest, contents.keys()).encode()
    return SwarmExport(files=files, stacks=made)


def _is_revision(config: Mapping[str, Any]) -> bool:
    """Return whether the config is a revision of a stack.  Stacks of the new cluster get their own revisions."""
    return STACK_REVISION in ((config.get("Spec") or {}).get("Labels") or {})


def _free_name(taken: Collection[str]) -> str:
    """Return ``REST``, with a number if a stack already has that name."""
    numbered = (f"{REST}-{number}" for number in count(2))
    return next(name for name in chain((REST,), numbered) if name not in taken)


def _contents(configs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bytes]]:
    for config in configs:
        spec = config.get("Spec") or {}
        name, data = str(spec.get("Name", "")), spec.get("Data") or ""
        if _FILE_NAME.fullmatch(name) and not spec.get("Templating"):
            try:
                yield name, base64.b64decode(data, validate=True)
            except (binascii.Error, TypeError, ValueError):
                continue  # an external config, which has to exist


def _labels(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return entries with the ``labels`` of configs, without the stack's own labels, by config name."""
    found = {
        str((one.get("Spec") or {}).get("Name", "")): (one.get("Spec") or {}).get("Labels") for one in configs
    }
    kept = {
        name: {
            key: escaped(str(value)) for key, value in sorted((labels or {}).items()) if key != STACK_LABEL
        }
        for name, labels in found.items()
    }
    return {name: {"labels": labels} for name, labels in kept.items() if labels}


def _with_configs(one: Imported, contents: Mapping[str, bytes], labels: Mapping[str, Any]) -> Imported:
    """Return the document with configs read from files, so that a change of a file updates the services."""
    configs = {
        key: {"file": f"./configs/{entry['name']}"} | labels.get(entry["name"], {})
        if entry["name"] in contents
        else entry
        for key, entry in one.document.get("configs", {}).items()
    }
    return replace(one, document=one.document | ({"configs": configs} if configs else {}))


def _page(objects: SwarmObjects, stacks: Mapping[str, Imported], rest: str, in_files: Collection[str]) -> str:
    return (
        "\n".join(line for section in _sections(objects, stacks, rest, in_files) for line in section) + "\n"
    )


def _sections(
    objects: SwarmObjects, stacks: Mapping[str, Imported], rest: str, in_files: Collection[str]
) -> Iterator[list[str]]:
    yield _START
    yield _block(_node_commands(objects.nodes))
    yield [
        "## 2. Secrets",
        "",
        "No API shows the value of a secret. Create the secrets from your own copies:",
        "",
    ]
    yield _block([_payload_command("secret", one) for one in objects.secrets])
    if others := [one for one in objects.configs if (one.get("Spec") or {}).get("Name") not in in_files]:
        yield [
            "The files do not have these configs: templates, and configs whose names cannot be file names.",
            "",
        ]
        yield _block([_payload_command("config", one) for one in others])
    yield ["## 3. Networks that no stack creates", ""]
    yield _block(_network_commands(objects.networks, _others_networks(objects.networks, stacks)))
    yield _VOLUMES
    yield _list(
        f"`{(entry or {}).get('name') or f'{name}_{key}'}` of the stack {name}"
        for name, one in stacks.items()
        for key, entry in one.document.get("volumes", {}).items()
    )
    yield ["## 5. Stacks", ""]
    yield _block(f"skep stack deploy --compose-file {name}.yaml {name}" for name in stacks)
    if rest in stacks:
        yield [
            f"The services in `{rest}.yaml` belonged to no stack. They are now called `{rest}_NAME`, and keep their",
            "old name on the stack's networks.",
            "",
        ]
    yield ["## Settings that the files lack", ""]
    yield _list(
        str(replace(note, path=f"{name}.yaml: {note.path}"))
        for name, one in stacks.items()
        for note in one.notes
    )


def _payload_command(kind: str, found: Mapping[str, Any]) -> str:
    """Return the command that creates a secret or config, without its content."""
    spec = found.get("Spec") or {}
    words = ["docker", kind, "create"]
    for option, key in (("--driver", "Driver"), ("--template-driver", "Templating")):
        words += [option, str(spec[key].get("Name", ""))] if spec.get(key) else []
    for key, value in sorted((spec.get("Labels") or {}).items()):
        words += ["--label", f"{key}={value}"]
    return f"{shlex.join([*words, *_named(spec.get('Name', ''))])} FILE"


def _named(name: object) -> list[str]:
    """Return the words for a name after options, with ``--`` before a name that begins with ``-``."""
    return ["--", str(name)] if str(name).startswith("-") else [str(name)]


def _others_networks(networks: Sequence[Mapping[str, Any]], stacks: Mapping[str, Imported]) -> list[str]:
    """Return lines about networks that no stack creates: external networks, and networks without a service."""
    external, made = set[str](), set[str]()
    for stack, one in stacks.items():
        for key, entry in one.document.get("networks", {}).items():
            is_external = bool(entry and entry.get("external"))
            (external if is_external else made).add((entry or {}).get("name") or f"{stack}_{key}")
    rest = {
        str(one.get("Name")) for one in networks if one.get("Scope") == "swarm" and not one.get("Ingress")
    }
    return sorted(external | rest - made)


def _block(lines: Iterator[str] | Sequence[str]) -> list[str]:
    found = [" ".join(one.split("\n")) for one in lines]
    return ["```sh", *found, "```", ""] if found else ["None.", ""]


def _list(lines: Iterator[str]) -> list[str]:
    found = [f"* {' '.join(one.split())}" for one in lines]
    return [*(found or ["None."]), ""]


def _node_commands(nodes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for node in nodes:
        spec, description = node.get("Spec") or {}, node.get("Description") or {}
        name = shlex.join(_named(description.get("Hostname") or node.get("ID")))
        role = " --role manager" if spec.get("Role") == "manager" else ""
        labels = "".join(
            f" --label-add {shlex.quote(f'{key}={value}')}"
            for key, value in sorted((spec.get("Labels") or {}).items())
        )
        availability = spec.get("Availability")
        paused = (
            f" --availability {shlex.quote(str(availability))}"
            if availability not in (None, "active")
            else ""
        )
        if role or labels or paused:
            yield f"docker node update{role}{labels}{paused} {name}"


def _network_commands(networks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    by_name = {str(one.get("Name")): one for one in networks}
    for name in names:
        found = by_name.get(name, {})
        words = ["docker", "network", "create", "--driver", str(found.get("Driver") or "overlay")]
        words += ["--attachable"] if found.get("Attachable") else []
        words += ["--internal"] if found.get("Internal") else []
        words += ["--ipv6"] if found.get("EnableIPv6") else []
        words += ["--ipv4=false"] if found.get("EnableIPv4") is False else []
        words += list(_address_options(found.get("IPAM") or {}))
        for key, value in sorted((found.get("Options") or {}).items()):
            words += ["--opt", f"{key}={value}"] if "vxlanid" not in key else []
        for key, value in sorted((found.get("Labels") or {}).items()):
            words += ["--label", f"{key}={value}"]
        yield shlex.join([*words, *_named(name)])


def _address_options(ipam: Mapping[str, Any]) -> Iterator[str]:
    if ipam.get("Driver") not in (None, "", "default"):
        yield from ("--ipam-driver", str(ipam["Driver"]))
    for pool in ipam.get("Config") or ():
        for option, key in (("--subnet", "Subnet"), ("--gateway", "Gateway"), ("--ip-range", "IPRange")):
            if pool.get(key):
                yield from (option, str(pool[key]))
        for name, address in sorted((pool.get("AuxiliaryAddresses") or {}).items()):
            yield from ("--aux-address", f"{name}={address}")
    for key, value in sorted((ipam.get("Options") or {}).items()):
        yield from ("--ipam-opt", f"{key}={value}")


def notes_of(move: SwarmExport) -> list[tuple[str, Note]]:
    """Return the notes of all stacks, each with the stack's name."""
    return [(name, note) for name, one in move.stacks.items() for note in one.notes]
