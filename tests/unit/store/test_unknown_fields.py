"""What a newer version wrote, at whatever depth, stays when this one reads, changes and writes the object."""

from collections.abc import Callable, Iterator
from itertools import count, cycle
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect
from msgspec.structs import replace

from skep.model.container import ContainerSpec, Mount, SecretReference
from skep.model.network import IPAMConfig
from skep.model.node import EngineDescription, EnginePlugin, Node, NodeDescription
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import PortConfig, Service, TaskSpec
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import SecretId
from skep.model.values.unknown import divided, joined, leniently
from skep.store.interface import Object
from skep.store.keys import object_key
from skep.store.kinds import SpecVersion
from skep.store.schema import SCHEMA_BY_TYPE
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.unit.store.test_merge import changes_of, parts_of

MOUNTS = tuple(Mount(type="volume", source=f"v{n}", target=f"/v{n}") for n in range(3))
SECRETS = tuple(SecretReference(secret_id=SecretId(f"s{n}"), secret_name=f"s{n}") for n in range(2))


def a_rich_service() -> Service:
    container = ContainerSpec(image="busybox:1", mounts=MOUNTS, secrets=SECRETS)
    ports = (PortConfig(target_port=80, published_port=8080), PortConfig(target_port=81, published_port=8081))
    service = a_service("x", ports=ports)
    return replace(service, spec=replace(service.spec, task_template=TaskSpec(container_spec=container)))


def a_rich_node() -> Node:
    plugins = tuple(EnginePlugin(type="Volume", name=name) for name in ("local", "nfs"))
    engine = EngineDescription(labels={"a": "b"}, plugins=plugins)
    return replace(a_node("x"), description=NodeDescription(hostname="x", engine=engine))


def a_rich_task() -> Task:
    places = tuple(NetworkAttachment(network=an_overlay(name), addresses=("10.0.0.2/24",)) for name in "ab")
    return replace(a_task("x", node="n1", state=TaskState.RUNNING), networks_attachments=places)


OBJECTS: tuple[Object, ...] = (
    a_rich_service(),
    a_rich_node(),
    a_rich_task(),
    an_overlay("x"),
    Config(id="x", spec=ConfigSpec(name="x", data=b"data")),  # type: ignore[arg-type]
    SpecVersion(id="x/1", service_id=a_service("x").id, index=1, spec=a_rich_service().spec),
)


VALUES = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.dictionaries(st.sampled_from(["Newer", "Newest", "Spécial"]), VALUES, max_size=2)


def enriched(value: Any, shape: inspect.Type, new_fields: Callable[[], dict[str, Any]]) -> Any:
    """``value`` with further fields in the objects (not mappings) that are in it."""
    shape = bare(shape)
    if isinstance(shape, inspect.StructType) and isinstance(value, dict):
        shapes = {field.encode_name: field.type for field in shape.fields}
        known = {
            name: enriched(item, shapes[name], new_fields) if name in shapes else item
            for name, item in value.items()
        }
        return known | new_fields()
    if isinstance(shape, inspect.VarTupleType) and isinstance(value, list):
        return [enriched(item, shape.item_type, new_fields) for item in value]
    return value


def bare(shape: inspect.Type) -> inspect.Type:
    while isinstance(shape, inspect.Metadata | inspect.UnionType):
        shape = shape.type if isinstance(shape, inspect.Metadata) else next(
            part for part in shape.types if not isinstance(part, inspect.NoneType)
        )  # fmt: skip
    return shape


def written_by_a_newer_one(
    one: Object, new_fields: Callable[[], dict[str, Any]]
) -> tuple[State, dict[str, Any]]:
    """A state with ``one`` as a newer version wrote it, and each of its keys' JSON."""
    schema = SCHEMA_BY_TYPE[type(one)]
    shape = inspect.type_info(schema.type)
    stored: dict[str, Any] = {}
    for part, encoded in parts_of(one).items():
        if encoded is not None:
            key = object_key(schema.name, one.id, part)  # type: ignore[attr-defined]
            stored[key] = enriched(msgspec.json.decode(encoded), shape, new_fields)
    state = State()
    state.apply(1, [KeyChange(key, msgspec.json.encode(value), 1, 1) for key, value in stored.items()])
    state.apply(
        1, changes_of(*(Secret(id=one.secret_id, spec=SecretSpec(name=one.secret_name)) for one in SECRETS))
    )
    return state, stored


def numbered() -> Callable[[], dict[str, Any]]:
    """A new field in every object, none like another."""
    numbers = count()
    return lambda: {"Newer": {"Number": next(numbers)}}


@settings(max_examples=60)
@given(st.sampled_from(OBJECTS), st.lists(FIELDS, min_size=1, max_size=8))
def test_at_any_depth_of_any_part_they_are_read_over_and_written_back(one, additions):
    turns = cycle(additions)
    state, stored = written_by_a_newer_one(one, lambda: next(turns))
    schema = SCHEMA_BY_TYPE[type(one)]
    table = state.table_by_name[schema.name]
    assert (table.unreadable, table.damaged) == ({}, {})
    assert table.objects[one.id] == one
    for part in parts_of(one):
        key = object_key(schema.name, one.id, part)
        if key in stored:
            assert msgspec.json.decode(table.encoded(part, one.id, one)) == stored[key]


def spec_of(json: Any) -> Any:
    return json["Spec"]["TaskTemplate"]["ContainerSpec"]


def with_mounts(service: Service, mounts: tuple[Mount, ...]) -> Service:
    template = service.spec.task_template
    assert template.container_spec is not None
    container = replace(template.container_spec, mounts=mounts)
    return replace(
        service, spec=replace(service.spec, task_template=replace(template, container_spec=container))
    )


def written(state: State, changed: Object) -> dict[str, Any]:
    """What a manager of this version writes for ``changed``, by key."""
    tx = LocalTransaction(state, 1)
    tx.put(changed)
    return {key: msgspec.json.decode(value) for key, value in tx.proposal().puts if key.startswith("o/")}


def all_new(json: Any) -> Iterator[int]:
    if isinstance(json, dict):
        if "Newer" in json:
            yield json["Newer"]["Number"]
        for value in json.values():
            yield from all_new(value)
    elif isinstance(json, list):
        for value in json:
            yield from all_new(value)


def test_items_keep_theirs_when_they_are_moved_and_changed() -> None:
    service = a_rich_service()
    state, stored = written_by_a_newer_one(service, numbered())
    first, second, third = MOUNTS
    changed = with_mounts(service, (third, Mount(target="/new"), replace(second, read_only=True), first))
    before = spec_of(stored["o/service/x"])["Mounts"]
    new = {mount["Target"]: mount.get("Newer") for mount in before}
    now = spec_of(written(state, changed)["o/service/x"])["Mounts"]
    assert {mount["Target"]: mount.get("Newer") for mount in now} == {**new, "/new": None}
    assert [mount["Target"] for mount in now] == ["/v2", "/new", "/v1", "/v0"]


def test_what_goes_takes_its_own_along_and_no_other_gets_them() -> None:
    service = a_rich_service()
    state, stored = written_by_a_newer_one(service, numbered())
    changed = with_mounts(service, (MOUNTS[0], Mount(type="bind", source="/s", target="/other")))
    now = written(state, changed)["o/service/x"]
    gone = {mount["Newer"]["Number"] for mount in spec_of(stored["o/service/x"])["Mounts"][1:]}
    assert set(all_new(stored["o/service/x"])) - set(all_new(now)) == gone
    without = replace(service, spec=replace(service.spec, endpoint_spec=None))
    assert "EndpointSpec" not in written(state, without)["o/service/x"]["Spec"]


def test_what_has_no_name_keeps_its_own_while_it_is_the_same() -> None:
    service = a_rich_service()
    state, stored = written_by_a_newer_one(service, numbered())
    assert service.spec.endpoint_spec is not None
    first, second = service.spec.endpoint_spec.ports
    endpoint = replace(service.spec.endpoint_spec, ports=(replace(second, published_port=9), second, first))
    now = written(state, replace(service, spec=replace(service.spec, endpoint_spec=endpoint)))
    ports = now["o/service/x"]["Spec"]["EndpointSpec"]["Ports"]
    before = stored["o/service/x"]["Spec"]["EndpointSpec"]["Ports"]
    assert [port.get("Newer") for port in ports] == [None, before[1]["Newer"], before[0]["Newer"]]


def test_the_spec_that_tasks_follow_has_them_too() -> None:
    service = a_rich_service()
    state, _ = written_by_a_newer_one(service, numbered())
    changed = with_mounts(service, MOUNTS[:2])
    puts = written(state, changed)
    (version,) = (value for key, value in puts.items() if key.startswith("o/spec/"))
    assert version["Spec"] == puts["o/service/x"]["Spec"]
    assert set(all_new(version["Spec"])) > {1}


def test_places_on_networks_keep_theirs_by_the_networks_id() -> None:
    task = a_rich_task()
    state, stored = written_by_a_newer_one(task, numbered())
    one, other = task.networks_attachments
    changed = replace(task, networks_attachments=(replace(other, addresses=("10.0.0.9/24",)), one))
    now = written(state, changed)["o/task/x.networks"]["NetworksAttachments"]
    before = stored["o/task/x.networks"]["NetworksAttachments"]
    assert [place["Newer"] for place in now] == [before[1]["Newer"], before[0]["Newer"]]
    assert set(all_new(now)) == set(all_new(before))


def test_damage_at_depth_is_still_damage() -> None:
    state = State()
    node = msgspec.json.decode(parts_of(a_rich_node())["status"] or b"{}")
    damaged = {**node, "Newer": 1, "Status": {"State": 5, "Newer": 2}}
    state.apply(1, changes_of(a_rich_node()))
    state.apply(2, [KeyChange("o/node/x.status", msgspec.json.encode(damaged), 2, 1)])
    assert "status" in state.damaged(Node)["x"]


def test_a_default_that_is_left_out_has_them_and_what_is_taken_away_has_none() -> None:
    class Inner(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, frozen=True):
        a: int = 0

    class Outer(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, frozen=True):
        always: Inner = Inner()
        perhaps: Inner | None = None
        by_key: dict[str, Inner] = {}

    data = b'{"always":{"a":1,"x":1},"perhaps":{"a":1,"x":2},"by_key":{"k":{"x":3},"l":{"x":4}},"y":5}'
    known, unknown = divided(data, Outer)
    assert msgspec.json.decode(known, type=Outer) == Outer(Inner(1), Inner(1), {"k": Inner(), "l": Inner()})
    now = joined(msgspec.json.encode(Outer(by_key={"k": Inner(7)})), unknown, Outer)
    assert msgspec.json.decode(now) == {"always": {"x": 1}, "by_key": {"k": {"a": 7, "x": 3}}, "y": 5}


@pytest.mark.parametrize("value", [b"[]", b"3", b'{"ID": 5, "Newer": 1}', b"{", b'{"ID": "x", "Spec": []}'])
def test_what_is_damaged_is_not_read_leniently(value: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        leniently(value, Service)


def test_unknown_fields_do_not_prevent_reading() -> None:
    encoded = msgspec.json.decode(msgspec.json.encode(a_rich_node().description))
    richer = enriched(encoded, inspect.type_info(NodeDescription), numbered())
    assert leniently(msgspec.json.encode(richer), NodeDescription) == a_rich_node().description
    assert leniently(b'{"Subnet":"10.0.0.0/8","Newer":[]}', IPAMConfig) == IPAMConfig(subnet="10.0.0.0/8")
