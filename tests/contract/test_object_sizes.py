"""How large objects may be at the store, and what is said of one that is larger."""

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.structs import replace

from skep.errors import ResourceExhausted
from skep.model.container import ContainerSpec, ImageMountOptions, Mount
from skep.model.network import Network
from skep.model.node import EnginePlugin, Node
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service, TaskSpec
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import ConfigId, SecretId
from skep.store.interface import Object, Store, Transaction
from skep.store.kinds import Payload
from skep.store.schema import SCHEMA_BY_TYPE
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.support.store.store_transactions import put
from tests.unit.store.test_merge import parts_of


@dataclass
class Case:
    """An object of which something is ``size`` bytes or characters large."""

    name: str
    made: Callable[[int], Any]


def a_described_node(**description: object) -> Node:
    node = a_node("n1")
    return replace(node, description=replace(node.description, **description))  # type: ignore[arg-type]


def plugins(size: int) -> Node:
    engine = a_node("n1").description.engine
    many = tuple(EnginePlugin(type="Volume", name=f"{number:0100}") for number in range(size // 120))
    rest = EnginePlugin(type="Volume", name="x" * (size % 120))
    return a_described_node(engine=replace(engine, plugins=(*many, rest)))


def node_labels(size: int) -> Node:
    node = a_node("n1")
    return replace(node, spec=replace(node.spec, labels={"zone": "x" * size}))


def a_tasks_error(size: int) -> Task:
    task = a_task("t1")
    return replace(task, status=replace(task.status, err="x" * size))


def network_labels(size: int) -> Network:
    network = an_overlay("net1")
    return replace(network, spec=replace(network.spec, labels={"a": "x" * size}))


def swarm_labels(size: int) -> Swarm:
    return Swarm(id="c", spec=replace(Swarm(id="c").spec, labels={"a": "x" * size}))  # type: ignore[arg-type]


def a_secrets_labels(size: int) -> Secret:
    return Secret(id=SecretId("s"), spec=SecretSpec(name="s", labels={"a": "x" * size}))


def a_specs_mount(size: int) -> Service:
    mount = Mount(type="image", image_options=ImageMountOptions(subpath="x" * size))
    spec = TaskSpec(container_spec=ContainerSpec(image="busybox:1", mounts=(mount,)))
    service = a_service("web")
    return replace(service, spec=replace(service.spec, task_template=spec))


CASES = [
    Case("plugins of a node", plugins),
    Case("a long host name", lambda size: a_described_node(hostname="x" * size)),
    Case("labels of a node", node_labels),
    Case("the error of a task", a_tasks_error),
    Case("labels of a network", network_labels),
    Case("labels of the cluster", swarm_labels),
    Case("data", lambda size: Payload(id="secret/s", data=b"x" * size)),
    Case("a secret's labels", a_secrets_labels),
    Case("a config's data", lambda size: Config(id=ConfigId("c"), spec=ConfigSpec(name="c", data=b"x" * size))),
]  # fmt: skip

STAMPS_VARY = 32
"""Bytes: of times, zeros at the end are not written."""
TOO_LARGE = re.compile(r"(\w+) (\S+) is too large: (\d+) of at most (\d+) bytes")


async def refusal(store: Store, one: Object) -> str:
    """Why it was not taken; empty: it was."""
    try:
        await store.update(put, one)
    except ResourceExhausted as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
async def test_up_to_its_limit_an_object_is_taken_and_beyond_it_is_named(store: Store, case: Case) -> None:
    kind = type(case.made(0))
    most = SCHEMA_BY_TYPE[kind].max_bytes
    beyond = await refusal(store, case.made(most))
    said = TOO_LARGE.fullmatch(beyond)
    assert said is not None, beyond
    assert said[1] == SCHEMA_BY_TYPE[kind].name
    assert int(said[4]) == most
    stamps = int(said[3]) - encoded_bytes(case.made(most))  # what the store itself writes into it
    first_beyond = bisect_right(range(most), most - stamps, key=lambda size: encoded_bytes(case.made(size)))
    assert TOO_LARGE.fullmatch(await refusal(store, case.made(first_beyond + STAMPS_VARY)))
    assert store.view().lookup(kind, said[2]) is None
    assert await refusal(store, case.made(first_beyond - STAMPS_VARY)) == ""
    assert store.view().get(kind, said[2]).id == said[2]  # type: ignore[attr-defined]


def encoded_bytes(one: Object) -> int:
    """Of the largest part."""
    return max(len(value) for value in parts_of(one).values() if value)


async def test_a_spec_is_stored_twice_and_three_times_when_it_changes(store: Store) -> None:
    """With its version, and with the one before it: each transaction has a limit, and what is there stays."""
    assert "service web is too large" in await refusal(store, a_specs_mount(1_100_000))
    said = await refusal(store, a_specs_mount(900_000))
    assert re.fullmatch(r"transaction too large: 18\d{5} of 1500000 bytes", said), said
    assert await refusal(store, a_specs_mount(480_000)) == ""

    def change(tx: Transaction, size: int) -> None:
        service = tx.get(Service, "web")
        tx.put(replace(service, spec=a_specs_mount(size).spec, previous_spec=service.spec))

    await store.update(change, 470_000)
    with pytest.raises(ResourceExhausted, match="service web is too large"):
        await store.update(change, 600_000)
    await store.update(change, 100)
    assert store.view().get(Service, "web").spec == a_specs_mount(100).spec
