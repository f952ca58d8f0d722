"""For a user of one stack, an object of others is answered as a missing one, by every endpoint of a manager.

Each request is sent to two managers.  One of them also has objects of other stacks and of none.  The whole responses
are compared: status, headers, body, order.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast
from urllib.parse import quote

import msgspec
import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.api.access.identity import identify
from skep.api.access.permissions import PermissionScope, rule_for
from skep.api.http.server import runner
from skep.manager.catalog.registrations import RegistrationRecord
from skep.manager.routes import _TABLES, application
from skep.manager.routes.access import Tunnelling
from skep.model.catalog import ServiceRegistration
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.permissions.access import Identity, Origin, Role, parse_binding
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service
from skep.model.values.ids import ConfigId, NetworkId, SecretId, VolumeId
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import Store
from skep.store.kinds import Payload
from tests.component.test_users_on_a_manager import NoTunnels, running
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_cluster_volume, a_node, a_service
from tests.support.store.store_transactions import put

ROLES = ("viewer:shop", "operator:shop", "viewer:shop operator:news")
SHARED = "5ame"
"""Ids of every stack start with it, so that a prefix of an id is ambiguous if foreign objects count."""


def ids(name: str) -> str:
    return f"{SHARED}{name.replace('_', '')}".ljust(25, "0")


def objects_of(prefix: str, labels: Mapping[str, str], subnet: str) -> Iterator[Any]:
    """One object of each kind."""
    service = a_service(f"{prefix}_web", id=ids(f"{prefix}s"))
    service = replace(service, spec=replace(service.spec, labels=labels))
    yield service
    yield running(ids(f"{prefix}t"), service)
    options = IPAMOptions(configs=(IPAMConfig(subnet=subnet),))
    spec = NetworkSpec(name=f"{prefix}_net", labels=labels, ipam_options=options)
    yield Network(id=NetworkId(ids(f"{prefix}n")), spec=spec)
    secret = SecretSpec(name=f"{prefix}_secret", labels=labels)
    yield Secret(id=SecretId(ids(f"{prefix}x")), spec=secret)
    yield Config(
        id=ConfigId(ids(f"{prefix}c")), spec=ConfigSpec(name=f"{prefix}_config", labels=labels, data=b"x")
    )
    registration = ServiceRegistration(
        service=f"{prefix}_db", instance="m1", stack=labels.get(STACK_LABEL, "")
    )
    record = msgspec.json.encode(RegistrationRecord(registration=registration))
    yield Payload(id=f"registration/{prefix}_db@m1", data=record)
    volume = a_cluster_volume(f"{prefix}_vol")
    yield replace(
        volume,
        id=VolumeId(ids(f"{prefix}v")),
        spec=replace(volume.spec, name=f"{prefix}_vol", labels=labels),
    )


FOREIGN = ("blog", "none")
"""Names of another stack, and of objects without a stack."""


def words(letter: str, noun: str) -> tuple[str, ...]:
    """Names, ids and prefixes of foreign objects, and a prefix that an own object shares with them."""
    named = [f"{prefix}_{noun}" for prefix in FOREIGN]
    with_id = [ids(f"{prefix}{letter}") for prefix in FOREIGN]
    return (*named, *with_id, *(f"{SHARED}{prefix}"[:8] for prefix in FOREIGN), SHARED)


WORDS = {
    "service": words("s", "web"),
    "task": (*words("t", "web.1"), "blog_web", f"none_web.1.{ids('nonet')}", f"{SHARED}blogs.1"),
    "target": (*words("t", "web.1"), "blog_web", "none_web"),
    "network": words("n", "net"),
    "secret": words("x", "secret"),
    "config": words("c", "config"),
    "volume": words("v", "vol"),
    "stack": ("blog",),
    "registration": ("blog_db@m1", "none_db@m1"),
}


async def fill(store: Store, *, has_foreign: bool) -> None:
    node = a_node("n1")
    await store.update(put, node)
    groups = [objects_of("shop", {STACK_LABEL: "shop"}, "10.90.0.0/24")]
    if has_foreign:
        groups += [
            objects_of("blog", {STACK_LABEL: "blog"}, "10.91.0.0/24"),
            objects_of("none", {}, "10.92.0.0/24"),
        ]
    for group in groups:
        for one in group:
            await store.update(put, one)


class Rig:
    """A manager's API, for one user."""

    def __init__(self, new_handler: Any, store: Store) -> None:
        self._new_handler = new_handler
        self.store = store

    async def answer(self, roles: str, request: str, body: Any = None) -> str:
        """Return the whole response without times, lengths and generated ids."""
        ours, theirs = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(self._new_handler, theirs)
        bindings = tuple(map(parse_binding, roles.split()))
        identify(transport, Identity(name="ann", origin=Origin.TOKEN, bindings=bindings))
        reader, writer = await asyncio.open_connection(sock=ours)
        data = msgspec.json.encode(body) if body is not None else b""
        head = f"{request} HTTP/1.1\r\nHost: m\r\nContent-Length: {len(data)}\r\n"
        upgrade = "Upgrade: tcp\r\nConnection: Upgrade\r\n" if "/port/" in request else ""
        writer.write(f"{head}{upgrade}\r\n".encode() + data)
        try:
            async with asyncio.timeout(10):
                found = (await reader.read()).decode()  # the connection of a token ends with its response
        finally:
            writer.close()
            transport.abort()
        found = re.sub(r"Date: [^\r]+", "Date:", found)
        found = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?", "TIME", found)
        found = re.sub(rf"\b(?!{SHARED})[0-9a-z]{{25}}\b", "NEW ID", found)
        return re.sub(r"Content-Length: \d+", "Content-Length:", found)


@asynccontextmanager
async def a_rig(*, has_foreign: bool) -> AsyncIterator[Rig]:
    async with a_manager_api() as api:
        await fill(api.store, has_foreign=has_foreign)
        served = runner(application(replace(api, tunnels=cast("Tunnelling", NoTunnels()))))
        await served.setup()
        try:
            yield Rig(served.server, api.store)
        finally:
            await served.cleanup()


@asynccontextmanager
async def both() -> AsyncIterator[tuple[Rig, Rig]]:
    async with a_rig(has_foreign=True) as one, a_rig(has_foreign=False) as other:
        yield one, other


def spec(name: str = "shop_new", **fields: Any) -> dict[str, Any]:
    """A service's spec, with ``networks``, ``secrets``, ``configs``, ``mounts`` and ``depends`` of these words."""
    container: dict[str, Any] = {"Image": "busybox"}
    container["Secrets"] = [
        {"SecretID": word, "SecretName": "shop_secret", "File": {"Name": "x", "Mode": 292}}
        for word in fields.get("secrets", ())
    ]
    container["Configs"] = [
        {"ConfigID": word, "ConfigName": "shop_config", "File": {"Name": "x", "Mode": 292}}
        for word in fields.get("configs", ())
    ]
    container["Mounts"] = [
        {"Type": "cluster", "Source": word, "Target": "/data"} for word in fields.get("mounts", ())
    ]
    labels = {STACK_LABEL: "shop"}
    if depends := fields.get("depends"):
        labels["skep.depends-on"] = f"{depends}=service_started"
    networks = [{"Target": word} for word in fields.get("networks", ())]
    return {
        "Name": name,
        "Labels": labels,
        "TaskTemplate": {"ContainerSpec": container, "Networks": networks},
    }


def specs() -> Iterator[dict[str, Any]]:
    """Specs that refer to foreign objects, and to own ones by a prefix that foreign objects share."""
    for word in WORDS["network"]:
        yield spec(networks=(word,))
    for word in WORDS["secret"]:
        yield spec(secrets=(word,))
    for word in WORDS["config"]:
        yield spec(configs=(word,))
    for word in WORDS["volume"]:
        yield spec(mounts=(word,))
    for name in ("blog_web", "none_web"):
        yield spec(depends=name)
        yield spec(name)
    yield {**spec(), "Labels": {STACK_LABEL: "blog"}}


BODIES = {
    "service": spec("shop_web"),
    "network": {"Name": "shop_more", "Driver": "overlay", "Labels": {STACK_LABEL: "shop"}},
    "secret": {"Name": "shop_secret", "Labels": {STACK_LABEL: "shop"}},
    "config": {"Name": "shop_config", "Labels": {STACK_LABEL: "shop"}, "Data": "eA=="},
    "target": {"Cmd": ["id"]},
}


def new_objects(path: str) -> Iterator[Any]:
    """Bodies of a path that creates objects."""
    match path:
        case "/services/create":
            yield from specs()
        case "/skep/services/placement" | "/skep/what-if/services" | "/skep/what-if/survive":
            yield from ([one] for one in specs())
        case "/skep/services/changes":
            yield from ([{"Spec": one}] for one in specs())
            for id in WORDS["service"][2:4]:
                yield [{"Spec": spec("shop_web"), "ID": id, "Version": 1}]
        case "/skep/stacks/check":
            yield from ({"Services": [{"Spec": one}]} for one in specs())
            for id in WORDS["service"][2:4]:
                yield {"Services": [{"Spec": spec("shop_web"), "ID": id, "Version": 1}]}
                yield {"Removed": [id]}
                # A body of the other stack must not open it.
                theirs = {"Name": "blog_s", "Labels": {STACK_LABEL: "blog"}}
                yield {"Secrets": [theirs], "Removed": [id]}
        case "/networks/create" | "/secrets/create" | "/configs/create":
            noun = path.split("/")[1].removesuffix("s")
            for word in WORDS[noun][:2]:
                yield {**BODIES[noun], "Name": word}
                yield {**BODIES[noun], "Name": word, "Labels": {}}
        case "/skep/registrations/{name}":
            for name in ("blog_db", "none_db"):
                body = {"Service": name, "Instance": "m1", "Address": "192.0.2.7", "Port": 80}
                yield from (body, body | {"Stack": "shop"}, body | {"Stack": "blog"})
        case _:
            raise AssertionError(f"no body for {path}")


def lists(path: str) -> Iterator[str]:
    """Queries of a list, whose filters name foreign objects."""
    yield path
    noun = path.rpartition("/")[2].removesuffix("s")
    filters = {
        "service": ("name", "id"),
        "network": ("name", "id"),
        "secret": ("name", "names", "id"),
        "config": ("name", "id"),
        "task": ("name", "id", "service"),
    }.get(noun, ())
    for name in filters:
        for word in WORDS["service" if name == "service" else noun]:
            text = msgspec.json.encode({name: {word: True}}).decode()
            yield f"{path}?filters={quote(text)}"
    if noun == "service":
        yield f"{path}?status=true"


_QUERIES = {
    "/services/{id}/update": "?version=1",
    "/secrets/{id}/update": "?version=1",
    "/configs/{id}/update": "?version=1",
    "/services/{id}/logs": "?stdout=1",
    "/tasks/{id}/logs": "?stdout=1",
    "/networks/{id}": "?verbose=true",
}
_WITHOUT_OBJECTS = frozenset((PermissionScope.ANY, PermissionScope.CLUSTER))


def requests() -> Iterator[tuple[str, Any]]:
    """Every request about an object of a stack that a user below administrator may make, for every foreign word."""
    for table in _TABLES:
        for route in table:
            assert isinstance(route, web.RouteDef)
            path = re.sub(r"\{(\w+):[^/]+\}", r"{\1}", route.path.replace("{1,5}", ""))
            rule = rule_for(route.method, path)
            if rule.role is Role.ADMIN or rule.scope in _WITHOUT_OBJECTS:
                continue
            version = "/v1.44"
            if rule.scope is PermissionScope.LIST:
                for query in lists(path):
                    yield f"{route.method} {version}{query}", None
            elif rule.scope is PermissionScope.NEW:
                for body in new_objects(path):
                    yield f"{route.method} {version}{path}", body
            else:
                for word in WORDS[rule.kind]:
                    if word == SHARED and route.method != "GET":
                        continue  # it changes the own object, whose version differs afterwards
                    target = re.sub(r"\{(id|name)\}", quote(word), path, count=1)
                    target = target.replace("{exec}", "e" * 64).replace("{port}", "80")
                    body = BODIES.get(rule.kind) if route.method == "POST" else None
                    yield f"{route.method} {version}{target}{_QUERIES.get(path, '')}", body


@pytest.mark.parametrize("roles", ROLES)
async def test_an_object_of_others_is_answered_as_a_missing_one(roles: str) -> None:
    different, number = [], 0
    async with both() as (with_foreign, without):
        for request, body in requests():
            answers = [await one.answer(roles, request, body) for one in (with_foreign, without)]
            number += 1
            if answers[0] != answers[1]:
                different.append((request, body, *answers))
    assert not different, "\n".join(map(str, different))
    assert number > 400


@pytest.mark.parametrize("roles", ["viewer:shop", "operator:shop"])
async def test_no_answer_names_an_object_of_others(roles: str) -> None:
    """Also where the object has an effect, because it holds a port, a name or a subnet."""
    taken = {**BODIES["network"], "IPAM": {"Driver": "default", "Config": [{"Subnet": "10.91.0.0/25"}]}}
    async with a_rig(has_foreign=True) as rig:
        for request, body in (
            ("POST /networks/create", taken),
            ("POST /skep/stacks/check", {"Networks": [taken]}),
        ):
            answer = await rig.answer(roles, request, body)
            assert "blog" not in answer, answer
            if roles == "operator:shop":
                assert "Pool overlaps with other one on this address space: 10.91.0.0/25" in answer
        admin = await rig.answer("admin", "POST /networks/create", taken)
        assert "of network blog_net" in admin


async def test_a_visible_object_of_another_stack_is_refused_with_the_name_of_the_stack() -> None:
    """It is visible by another role of the user."""
    async with a_rig(has_foreign=True) as rig:
        for roles in ("operator:shop viewer:blog", "operator:shop viewer"):
            for request in (
                "DELETE /services/blog_web",
                "DELETE /networks/blog_net",
                "DELETE /secrets/blog_secret",
                "POST /skep/tasks/blog_web/container/exec",
            ):
                answer = await rig.answer(roles, request, {"Cmd": ["id"]})
                assert answer.startswith("HTTP/1.1 403 "), answer
                assert "belongs to the stack blog, and the user's roles are" in answer
        assert {one.spec.name for one in rig.store.view().find(Service)} >= {"blog_web", "none_web"}
