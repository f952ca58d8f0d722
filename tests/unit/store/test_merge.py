"""Parts put together: any order of arrival, damaged values, answers to older specs."""

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import Unavailable
from skep.manager.services.quotas import quota_of
from skep.model.node import Node, SessionOwner
from skep.model.quota import QuotaSpec, StackQuota
from skep.model.service import Service, TaskSpec, UpdateState, UpdateStatus
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.values.ids import QuotaId
from skep.model.values.meta import Version
from skep.store.codec import PartCodec
from skep.store.interface import Created, Deleted, Updated
from skep.store.keys import object_key
from skep.store.kinds import SpecVersion, has_unknown_spec, has_unreadable_spec, spec_of
from skep.store.schema import SCHEMA_BY_TYPE
from skep.store.state import State, differences
from skep.store.tables import KeyChange, ObjectTable
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_node, a_service, a_task


def parts_of(object: msgspec.Struct) -> dict[str, bytes | None]:
    schema = SCHEMA_BY_TYPE[type(object)]
    return {part: PartCodec(schema, part).encode(object) for part in ("", *schema.parts)}


def a_table(kind: type[msgspec.Struct]) -> ObjectTable:
    return ObjectTable(SCHEMA_BY_TYPE[kind])


def change(part: str, value: bytes | None, revision: int, created: int = 0) -> dict[str, KeyChange]:
    return {part: KeyChange(f"of {part}", value, revision, created)}


def whole(object: msgspec.Struct, revision: int = 1) -> dict[str, KeyChange]:
    return all_of({part: value for part, value in parts_of(object).items() if value}, revision)


def all_of(parts: Mapping[str, bytes | None], revision: int, created: int = 0) -> dict[str, KeyChange]:
    changes: dict[str, KeyChange] = {}
    for part, value in parts.items():
        changes |= change(part, value, revision, created or revision)
    return changes


def changes_of(*objects: msgspec.Struct, revision: int = 1) -> list[KeyChange]:
    changes = []
    for object in objects:
        kind = SCHEMA_BY_TYPE[type(object)].name
        for part, value in parts_of(object).items():
            if value is not None:
                key = f"o/{kind}/{object.id}" + (f".{part}" if part else "")  # type: ignore[attr-defined]
                changes.append(KeyChange(key, value, revision, revision))
    return changes


tasks = st.builds(
    lambda task, networks, state, message: replace(
        task, networks_attachments=networks, status=TaskStatus(state=state, message=message)
    ),
    st.builds(a_task, st.just("t1"), slot=st.integers(0, 5), node=st.sampled_from(["", "n1"])),
    st.lists(
        st.builds(NetworkAttachment, addresses=st.tuples(st.sampled_from(["10.0.0.1/24", "10.0.0.2/24"]))),
        max_size=2,
    ).map(tuple),
    st.sampled_from(list(TaskState)),
    st.text(max_size=5),
)


@given(tasks, st.permutations(["", "spec", "networks", "status"]))
def test_a_new_object_is_the_same_in_whatever_order_its_parts_are_listed(task, order):
    parts = parts_of(task)
    table = a_table(Task)
    table.apply("t1", all_of({part: parts[part] for part in order if parts[part] is not None}, 1))
    assert table.objects["t1"] == task


@given(tasks, tasks, st.permutations(["", "spec", "networks", "status"]))
def test_parts_changed_one_after_another_end_in_the_new_object(old, new, order):
    table = a_table(Task)
    table.apply("t1", whole(old))
    parts = parts_of(new)
    for revision, part in enumerate(order, start=2):
        table.apply("t1", change(part, parts[part], revision, 1))
    assert table.objects["t1"] == new
    assert table.find({"slot": f"web/{new.slot or new.node_id}"}) == [new]
    assert {part for part in order if parts[part] is not None} == {
        part for part in order if table.revision("t1", part)
    }


def test_what_one_object_loses_no_other_of_the_same_head_does():
    """Decoded values are shared by objects that say the same."""
    head = parts_of(a_task("t1"))[""]
    status = parts_of(a_task("t1", state=TaskState.RUNNING))["status"]
    table = a_table(Task)
    for id in ("t1", "t2"):
        table.apply(id, all_of({"": head, "status": status}, 1))
    table.apply("t1", all_of({"": head, "status": None}, 2, 1))
    table.apply("t2", change("", head, 3, 1))
    assert table.objects["t2"].status.state is TaskState.RUNNING


def test_a_part_without_a_head_is_no_object():
    table = a_table(Task)
    assert table.apply("t1", change("status", parts_of(a_task("t1"))["status"], 1, 1)) is None
    assert table.objects == {}


def test_where_its_keys_stand_is_remembered_while_there_is_an_object():
    table = a_table(Task)
    status = parts_of(a_task("t1", state=TaskState.RUNNING))["status"]
    table.apply("t1", change("status", status, 1, 1))
    assert table.revision("t1", "status") == 0
    table.apply("t1", whole(a_task("t1"), revision=2))
    table.apply("t1", change("status", status, 3, 2))
    assert (table.created["t1"], table.revision("t1", ""), table.revision("t1", "status")) == (2, 2, 3)
    table.apply("t1", change("", None, 4))
    assert (table.created, table.revision("t1", ""), table.revision("t1", "status")) == ({}, 0, 0)


def test_a_node_is_found_by_the_name_that_it_has_now():
    """The name lies in another part than the head."""
    table = a_table(Node)
    node = a_node("n1")
    table.apply("n1", whole(node))
    renamed = replace(node, description=replace(node.description, hostname="Other"))
    table.apply("n1", change("status", parts_of(renamed)["status"], 2, 1))
    assert table.find({"name": "other"}) == [renamed]
    assert table.find({"name": node.description.hostname}) == []


def test_a_value_that_cannot_be_read_leaves_its_part_as_it_was():
    table = a_table(Task)
    task = a_task("t1", state=TaskState.RUNNING)
    table.apply("t1", whole(task))
    for damaged in (b"", b"[", b'{"Status": 5}', b'{"Status": {"State": "confused"}}'):
        assert table.apply("t1", change("status", damaged, 2, 1)) is None
    assert table.objects["t1"] == task
    assert table.apply("t2", change("", b"{}", 2, 2)) is None
    assert list(table.objects) == ["t1"]


def test_parts_and_kinds_of_a_newer_version_are_passed_over():
    state = State()
    events = state.apply(
        2,
        [
            *changes_of(a_node("n1")),
            KeyChange("o/node/n1.future", b"1", 2, 2),
            KeyChange("o/comet/c1", b"1", 2, 2),
            KeyChange("x/y", b"1", 2, 2),
        ],
    )
    assert [type(event) for event in events] == [Created]


def test_a_removed_part_takes_its_defaults():
    table = a_table(Node)
    node = replace(a_node("n1"), session=SessionOwner(manager_id="m1"))  # type: ignore[arg-type]
    table.apply("n1", whole(node))
    event = table.apply("n1", change("session", None, 2))
    assert event == Updated(node, replace(node, session=None))


def answered(spec_version: int, responses: int) -> Service:
    """A service at one spec version, with an update status that answers another."""
    table = a_table(Service)
    status = UpdateStatus(state=UpdateState.UPDATING)
    table.apply("web", whole(replace(a_service("web", version=responses), update_status=status)))
    table.apply("web", change("", parts_of(a_service("web", version=spec_version))[""], 2, 1))
    service = table.objects["web"]
    assert isinstance(service, Service)
    return service


@given(st.integers(1, 5), st.integers(1, 5))
def test_an_answer_counts_only_for_the_spec_it_answers(spec_version, responses):
    service = answered(spec_version, responses)
    assert (service.update_status is not None) is (spec_version == responses)


def test_tasks_are_filled_when_their_spec_comes_later_and_emptied_when_it_goes():
    service = a_service("web", version=4)
    bare = replace(a_task("t1", service=service), spec=a_task().spec)
    spec = SpecVersion(id="web/4", service_id=service.id, index=4, spec=service.spec)
    bare = msgspec.structs.replace(bare, spec=type(bare.spec)())
    state = State()
    state.apply(1, changes_of(bare))
    (created, filled) = state.apply(2, changes_of(spec, revision=2))
    assert created == Created(spec)
    assert filled == Updated(bare, replace(bare, spec=service.spec.task_template))
    (deleted, emptied) = state.apply(3, [KeyChange("o/spec/web/4", None, 3)])
    assert deleted == Deleted(spec)
    assert emptied == Updated(replace(bare, spec=service.spec.task_template), bare)


def test_the_present_spec_of_a_service_stands_for_its_version_that_cannot_be_read():
    """Host ports are known by it, and so is what a task needs; an earlier one that cannot be read is not known."""
    service = a_service("web", version=4)
    state = State()
    state.apply(1, changes_of(service))
    state.apply(2, [KeyChange(f"o/spec/web/{index}", b"", 2, 2, damage="rotten") for index in (3, 4)])
    present, earlier = (replace(a_task("t1", service=service), spec_version=Version(index=n)) for n in (4, 3))
    assert has_unreadable_spec(state, present)
    assert spec_of(state, present) == service.spec
    assert has_unreadable_spec(state, earlier)
    assert spec_of(state, earlier) is None


def with_an_unreadable_present_version() -> tuple[Service, Task, State]:
    service = a_service("web", version=4)
    task = a_task("t1", service=service)
    state = State()
    state.apply(1, changes_of(service))
    damaged = KeyChange("o/spec/web/4", b"", 2, 2, damage="rotten")
    state.apply(2, [damaged, *changes_of(replace(task, spec=TaskSpec()), revision=2)])
    return service, task, state


def test_a_quota_that_cannot_be_read_is_not_taken_for_no_quota():
    """A manager that restarts with a damaged value would otherwise accept what the quota forbids."""
    state = State()
    quota, claim = StackQuota(id=QuotaId("q1"), spec=QuotaSpec(name="Shop", tasks=1)), "n/quota/shop"
    state.apply(1, [*changes_of(quota), KeyChange(claim, b"quota/q1", 1, 1)])
    assert quota_of(state, "Shop") is not None
    state = State()
    damaged = KeyChange("o/quota/q1", b"", 1, 1, damage="rotten")
    state.apply(1, [damaged, KeyChange(claim, b"quota/q1", 1, 1)])
    with pytest.raises(Unavailable, match=r"quota of the stack Shop cannot be read here: .*rotten"):
        quota_of(state, "Shop")
    assert quota_of(state, "other") is None, "other stacks are not affected"


def test_what_stood_for_a_version_that_cannot_be_read_is_kept_when_the_service_has_another():
    service, task, state = with_an_unreadable_present_version()
    state.apply(3, changes_of(a_service("web", image="other:2", version=5), revision=3))
    found = state.get(Task, task.id)
    assert found.spec == service.spec.task_template
    assert spec_of(state, found) == service.spec
    assert has_unreadable_spec(state, found)
    assert not has_unknown_spec(state, found)
    state.apply(4, [KeyChange("o/spec/web/4", None, 4)])
    assert spec_of(state, state.get(Task, task.id)) is None


def test_a_version_that_cannot_be_read_any_more_fills_in_the_tasks_of_a_state_loaded_anew():
    service, task, _ = with_an_unreadable_present_version()
    version = SpecVersion(id="web/4", service_id="web", index=4, spec=service.spec)
    before, after = State(), State()
    other = a_service("web", image="other:2", version=5)
    bare = replace(task, spec=TaskSpec())
    before.apply(1, changes_of(other, version, bare))
    damaged = KeyChange("o/spec/web/4", b"", 2, 2, damage="rotten")
    after.apply(2, [damaged, *changes_of(other, bare, revision=2)])
    assert has_unknown_spec(after, after.get(Task, task.id))
    after.keep_unreadable(before)
    assert after.get(Task, task.id) == before.get(Task, task.id)
    assert after.get(Task, task.id).spec == service.spec.task_template


@given(st.lists(tasks, max_size=3), st.lists(tasks, max_size=3))
def test_the_difference_of_two_states_leads_from_one_to_the_other(before, after):
    old, new = State(), State()
    old.apply(1, changes_of(*(replace(task, id=f"t{n}") for n, task in enumerate(before))))
    new.apply(2, changes_of(*(replace(task, id=f"t{n}") for n, task in enumerate(after)), revision=2))
    seen = {task.id: task for task in old.find(Task)}
    for event in differences(old, new):
        match event:
            case Created(object):
                assert object.id not in seen  # type: ignore[attr-defined]
                seen[object.id] = object  # type: ignore[attr-defined]
            case Updated(one, other):
                assert seen[one.id] == one != other  # type: ignore[attr-defined]
                seen[one.id] = other  # type: ignore[attr-defined]
            case Deleted(object):
                assert seen.pop(object.id) == object  # type: ignore[attr-defined]
    assert seen == {task.id: task for task in new.find(Task)}


@given(st.integers(0, 10**12))
def test_versions_survive_the_store(index):
    task = replace(a_task("t1"), version=Version(index=index))
    table = a_table(Task)
    table.apply("t1", whole(task))
    assert table.objects["t1"] == task


EXTRAS = st.dictionaries(
    st.text(min_size=1, max_size=8).map(lambda name: f"New{name}"),
    st.recursive(st.none() | st.integers(-9, 9) | st.text(max_size=5), st.lists, max_leaves=5),
    max_size=3,
)


@given(st.sampled_from(list(SCHEMA_BY_TYPE.values())), st.data())
def test_fields_of_a_newer_version_stay_when_this_one_writes(schema, data):
    """In every part of every kind, whatever of it this version changes."""
    objects = {Task: a_task("x", slot=1, node="n1"), Service: a_service("x"), Node: a_node("x")}
    one = objects.get(schema.type) or _an_object(schema.type)
    state, extras = State(), {}
    tx = LocalTransaction(State(), 1)
    tx.put(one)
    puts = dict(tx.proposal().puts)
    changes = []
    for part in ("", *schema.parts):
        key = object_key(schema.name, one.id, part)
        if (extra := data.draw(EXTRAS)) and (key in puts or part):
            extras[key] = extra
            puts[key] = msgspec.json.encode(msgspec.json.decode(puts.get(key, b"{}")) | extra)
    changes = [KeyChange(key, value, 1, 1) for key, value in puts.items()]
    state.apply(1, changes)
    table = state.table_by_type[schema.type]
    assert (table.unreadable, table.damaged) == ({}, {})
    read = table.objects[one.id]
    assert type(read) is schema.type
    for part in ("", *schema.parts):
        key = object_key(schema.name, one.id, part)
        encoded = table.encoded(part, one.id, read)
        stored = msgspec.json.decode(puts[key]) if key in puts else {}
        written = msgspec.json.decode(encoded) if encoded is not None else {}
        assert {name: written.get(name) for name in extras.get(key, {})} == extras.get(key, {})
        assert written == stored or not extras.get(key)


def _an_object(kind):
    required = {
        field.name: 1 if field.type is int else "x"
        for field in msgspec.structs.fields(kind)
        if field.required
    }
    return kind(**required)


def test_a_state_that_an_older_manager_writes_keeps_what_a_newer_one_has_written():
    state = State()
    state.apply(1, changes_of(a_task("t1", node="n1")))
    head = msgspec.json.decode(parts_of(a_task("t1", node="n1"))[""] or b"")
    stored = msgspec.json.encode(head | {"Priority": {"Class": "high"}})
    state.apply(2, [KeyChange("o/task/t1", stored, 2, 1)])
    tx = LocalTransaction(state, 1)
    tx.put(replace(tx.get(Task, "t1"), desired_state=TaskState.SHUTDOWN))
    ((_, written),) = tx.proposal().puts
    assert msgspec.json.decode(written)["Priority"] == {"Class": "high"}
    assert msgspec.json.decode(written)["DesiredState"] == "shutdown"
    state.apply(3, [KeyChange("o/task/t1", None, 3)])
    assert state.table_by_type[Task].extras == {}
