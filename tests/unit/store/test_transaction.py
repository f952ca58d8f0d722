"""Transactions against a plain model: whatever a body does, the store ends as the body saw it."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import ResourceExhausted, SkepError
from skep.model.network import Network, NetworkSpec
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import (
    EndpointSpec,
    NetworkAttachmentConfig,
    PortConfig,
    PublishMode,
    Service,
    ServiceSpec,
    TaskSpec,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ConfigId, SecretId, ServiceId
from skep.model.values.times import ZERO_TIME, Timestamp
from skep.store.copied import CopiedStore
from skep.store.interface import Transaction
from skep.store.keys import covering_prefix, parsed_object_key, reference_key, shared_key
from skep.store.kinds import SpecVersion
from skep.store.memory import MemoryCluster, MemoryStore
from skep.store.state import State, differences
from skep.store.transactions.proposal import Exists, NothingSince, Unchanged
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_node, a_service, a_task

NOW = Timestamp("2026-01-01T00:00:00Z")
IDS = st.sampled_from(["a", "b", "c"])
PORTS = st.sampled_from([0, 80, 81])


def require_equal(copied: Any, state: Any) -> None:
    """Check that a copy shows the same as the store, except for the times at which objects were written."""
    for table, other in zip(copied.tables, state.tables, strict=True):
        assert table.ids == other.ids
        assert table.indexes == other.indexes
        for id, object in table.objects.items():
            times = {"created_at": NOW, "updated_at": NOW} if hasattr(object, "updated_at") else {}
            assert replace(object, **times) == replace(other.objects[id], **times)
    owners = {claim: held.owner for claim, held in copied.claims.items()}
    assert owners == {claim: held.owner for claim, held in state.claims.items()}
    assert (copied.sharers, copied.users) == (state.sharers, state.users)


def service_of(id: str, name: str, networks: tuple[str, ...], port: int, mode: PublishMode) -> Service:
    return Service(
        id=ServiceId(id),
        spec=ServiceSpec(
            name=name,
            task_template=TaskSpec(networks=tuple(NetworkAttachmentConfig(target=one) for one in networks)),
            endpoint_spec=EndpointSpec(
                ports=(PortConfig(published_port=port, target_port=1, publish_mode=mode),)
            ),
        ),
    )


SERVICES = st.builds(
    service_of,
    IDS,
    st.sampled_from(["web", "WEB", "db"]),
    st.lists(IDS, max_size=2).map(tuple),
    PORTS,
    st.sampled_from(list(PublishMode)),
)


class StoreMachine(RuleBasedStateMachine):
    """Random transactions of several steps on two replicas; after each, all that must hold is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._begin())
        self.replicas = [self.first, self.second]
        self.versions: dict[tuple[str, str], int] = {}

    async def _begin(self) -> None:
        self.cluster = MemoryCluster()
        self.first = MemoryStore(SystemClock(), self.cluster)
        self.second = MemoryStore(SystemClock(), self.cluster)

    def teardown(self) -> None:
        self.loop.close()

    @rule(
        steps=st.lists(
            st.one_of(
                st.tuples(st.just("service"), SERVICES),
                st.tuples(st.just("network"), IDS),
                st.tuples(st.just("task"), IDS),
                st.tuples(st.just("hide"), IDS),
                st.tuples(st.just("answer"), IDS),
                st.tuples(st.just("drop"), st.tuples(st.sampled_from([Service, Network, Task]), IDS)),
            ),
            min_size=1,
            max_size=4,
        ),
        second=st.booleans(),
        cut=st.booleans(),
    )
    def transact(self, steps: list[tuple[str, Any]], second: bool, cut: bool) -> None:
        store = self.second if second else self.first
        other = self.first if second else self.second

        def body(tx: Any) -> dict[tuple[type[Any], str], Any]:
            for what, value in steps:
                match what:
                    case "service":
                        present = tx.lookup(Service, value.id)
                        tx.put(replace(present, spec=value.spec) if present else value)
                    case "network":
                        tx.put(Network(id=value, spec=NetworkSpec(name=f"net-{value}")))
                    case "task":
                        owner = tx.lookup(Service, value)
                        if owner is not None:
                            tx.put(replace(a_task(f"t{value}", service=owner), created_at=ZERO_TIME))
                    case "hide":
                        owner = tx.lookup(Service, value)
                        if owner is not None:
                            tx.put(replace(owner, removed_at=NOW))
                    case "answer":
                        owner = tx.lookup(Service, value)
                        if owner is not None:
                            tx.put(replace(owner, update_status=UpdateStatus(state=UpdateState.UPDATING)))
                    case "drop":
                        kind, id = value
                        if kind is Service:  # its tasks go first: they stand on its specs
                            for task in tx.find(Task, service_id=id):
                                tx.delete(Task, task.id)
                        tx.delete(kind, f"t{id}" if kind is Task else id)
            return {
                (kind, object.id): object
                for kind in (Service, Network, Task, SpecVersion)
                for object in tx.find(kind)
            }

        async def run() -> None:
            before = {
                (kind, object.id): object  # type: ignore[attr-defined]
                for kind in (Service, Network, Task, SpecVersion)
                for object in store.view().find(kind)
            }
            copy = CopiedStore(store.view(), SystemClock())
            if cut:
                other.partition()
            try:
                expected = await store.update(body)
            except SkepError as error:
                expected = before
                with pytest.raises(type(error)):
                    copy.apply(body)
            else:
                copy.apply(body)
            require_equal(copy.view(), store.view())
            seen = {
                (kind, object.id): object  # type: ignore[attr-defined]
                for kind in (Service, Network, Task, SpecVersion)
                for object in store.view().find(kind)
            }
            assert seen == expected, "what the body saw last is what the store shows"
            if cut:
                other.heal()

        self.loop.run_until_complete(run())

    @invariant()
    def replicas_are_equal_and_equal_to_a_fresh_load(self) -> None:
        fresh, _ = self.cluster.load()
        for store in self.replicas:
            state = store.view()
            assert isinstance(state, State)
            assert list(differences(state, fresh)) == []
            assert (state.claims, state.sharers, state.users) == (fresh.claims, fresh.sharers, fresh.users)
            for table, other in zip(state.tables, fresh.tables, strict=True):
                assert table.indexes == other.indexes
                assert (table.created, table.revisions) == (other.created, other.revisions)
                assert table.status_versions == other.status_versions

    @invariant()
    def names_and_ports_have_one_owner_and_references_their_objects(self) -> None:
        view = self.first.view()
        shown = [service for service in view.find(Service) if service.removed_at is None]
        names = [service.spec.name.lower() for service in shown]
        assert len(set(names)) == len(names)
        owners: dict[int, list[PublishMode]] = {}
        for service in shown:
            for attachment in service.spec.task_template.networks:
                assert view.lookup(Network, attachment.target) is not None
            assert service.spec.endpoint_spec is not None
            for port in service.spec.endpoint_spec.ports:
                owners.setdefault(port.published_port, []).append(port.publish_mode)
        for number, modes in owners.items():
            assert number == 0 or len(modes) == 1 or PublishMode.INGRESS not in modes

    @invariant()
    def versions_only_grow(self) -> None:
        now = {
            (type(object).__name__, object.id): object.version.index  # type: ignore[attr-defined]
            for kind in (Service, Network, Task)
            for object in self.first.view().find(kind)
        }
        for key, version in now.items():
            assert version >= self.versions.get(key, 0)
        self.versions = now

    @invariant()
    def tasks_follow_a_stored_spec(self) -> None:
        view = self.first.view()
        for task in view.find(Task):
            if view.lookup(Service, task.service_id) is not None:
                assert task.spec_version is not None
                version = view.get(SpecVersion, f"{task.service_id}/{task.spec_version.index}")
                assert task.spec == version.spec.task_template


def test_a_task_follows_a_spec_that_changes_again_in_the_same_transaction() -> None:
    machine = StoreMachine()
    machine.transact([("service", service_of("a", "web", (), 0, PublishMode.INGRESS))], False, False)
    machine.transact([("network", "b")], False, False)
    again = [
        ("service", service_of("a", "web", ("b",), 0, PublishMode.INGRESS)),
        ("task", "a"),
        ("service", service_of("a", "web", (), 80, PublishMode.INGRESS)),
    ]
    machine.transact(again, False, False)
    machine.tasks_follow_a_stored_spec()
    machine.teardown()


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestTransactions = StoreMachine.TestCase


def written(state: State, *objects: Any) -> State:
    """``state`` after a transaction that puts ``objects``."""
    from skep.store.tables import KeyChange

    tx = LocalTransaction(state, 0)
    for object in objects:
        tx.put(object)
    proposal = tx.proposal()
    revision = state.revision + 1
    state.apply(
        revision,
        [KeyChange(key, None, revision) for key in proposal.deletes]
        + [KeyChange(key, value, revision, revision) for key, value in proposal.puts],
    )
    return state


def test_only_changed_parts_are_written():
    state = written(State(), a_task("t1"))
    tx = LocalTransaction(state, 0)
    task = tx.lookup(Task, "t1")
    assert task is not None
    tx.put(replace(task, status=TaskStatus(state=TaskState.FAILED)))
    proposal = tx.proposal()
    assert [key for key, _ in proposal.puts] == ["o/task/t1.status"]
    assert set(proposal.compares) == {Unchanged("o/task/t1.status", 1), Exists("o/task/t1", 1)}


def test_what_is_removed_and_made_anew_in_one_transaction_is_written():
    state = written(State(), a_task("t1", slot=1))
    tx = LocalTransaction(state, 0)
    tx.delete(Task, "t1")
    tx.put(a_task("t1", slot=2))
    assert [key for key, _ in tx.proposal().puts] == ["o/task/t1"]


def test_putting_an_object_unchanged_writes_nothing():
    state = written(State(), a_service("web"))
    tx = LocalTransaction(state, 0)
    tx.put(tx.get(Service, "web"))
    assert tx.proposal().is_empty


def test_what_was_read_with_get_is_compared_and_what_was_looked_up_is_not():
    state = written(State(), a_task("t1"), Secret(id=SecretId("s"), spec=SecretSpec(name="s")))
    for read, expected in (("get", True), ("lookup", False)):
        tx = LocalTransaction(state, 0)
        getattr(tx, read)(Secret, "s")
        tx.put(a_task("t2"))
        assert (Unchanged("o/secret/s", 1) in tx.proposal().compares) is expected


def test_an_object_that_was_missing_must_still_be_missing():
    tx = LocalTransaction(State(), 0)
    assert tx.rely_on(Secret, "s") is None
    tx.put(a_task("t1"))
    assert Unchanged("o/secret/s", 0) in tx.proposal().compares


def test_a_removal_compares_that_no_reference_was_added():
    state = written(State(), Secret(id=SecretId("s"), spec=SecretSpec(name="s")))
    tx = LocalTransaction(state, 0)
    tx.delete(Secret, "s")
    assert NothingSince("r/secret/s/", state.revision) in tx.proposal().compares


def test_a_transaction_that_relies_on_all_objects_of_a_kind_compares_their_prefix():
    state = written(State(), a_service("web"))
    tx = LocalTransaction(state, 0)
    tx.rely_on_all(Service)
    tx.put(a_task("t1"))
    assert NothingSince("o/service/", state.revision) in tx.proposal().compares


def test_what_is_created_and_removed_in_one_transaction_leaves_nothing():
    tx = LocalTransaction(State(), 0)
    tx.put(a_service("web"))
    tx.delete(Service, "web")
    assert tx.proposal().is_empty


@given(st.from_regex(r"[a-z0-9/-]{1,30}", fullmatch=True), st.sampled_from(["", "status", "update"]))
def test_object_keys_are_read_back(id, part):
    from skep.store.keys import object_key

    assert parsed_object_key(object_key("task", id, part)) == ("task", id, part)


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        (reference_key(("secret", "s1"), ("service", "w")), "r/secret/s1/"),
        (shared_key("p/tcp/80", "service", "w"), "s/p/tcp/80/"),
        ("o/service/w", "o/service/"),
        ("o/network/n.allocation", "o/network/"),
        ("o/task/t", None),
        ("n/service/w", None),
    ],
)
def test_a_write_conflicts_with_compares_of_its_prefix(key, prefix):
    assert covering_prefix(key) == prefix


def test_an_object_has_the_size_limit_of_its_kind():
    def proposed(one):
        tx = LocalTransaction(State(), 0)
        tx.put(one)
        return tx.proposal()

    whole = "x" * (1000 * 1024)
    service, node = a_service("web"), a_node("n1")
    config = Config(id=ConfigId("c1"), spec=ConfigSpec(name="c", data=whole.encode()))
    assert proposed(config).size_bytes > 1_300_000
    with pytest.raises(ResourceExhausted, match=r"config c1 is too large: \d+ of at most 1400000 bytes"):
        proposed(replace(config, spec=replace(config.spec, data=whole.encode() * 2)))
    with pytest.raises(ResourceExhausted, match=r"service web is too large: \d+ of at most 1048576 bytes"):
        proposed(replace(service, spec=replace(service.spec, labels={"a": whole + whole[:50_000]})))
    with pytest.raises(ResourceExhausted, match=r"node n1 is too large: \d+ of at most 262144 bytes"):
        proposed(replace(node, spec=replace(node.spec, labels={"a": whole})))


async def test_no_task_is_made_from_a_spec_that_is_not_the_present_one_any_more() -> None:
    """Found by the simulation: such a version was removed as unused at the same time, and the task had no spec."""
    cluster = MemoryCluster()
    one, other = MemoryStore(SystemClock(), cluster), MemoryStore(SystemClock(), cluster)
    old = await one.update(lambda tx: tx.put(a_service("web")))
    assert await other.update(lambda tx: _made(tx, old)) is not None
    other.faults.lag_s = 0.05
    spec = replace(old.spec, labels={"changed": "yes"})
    await one.update(lambda tx: tx.put(replace(tx.get(Service, "web"), spec=spec)))
    assert other.view().get(Service, "web").spec_version == old.spec_version, "it is behind"
    assert await other.update(lambda tx: _made(tx, old)) is None


def _made(tx: Transaction, service: Service) -> Task | None:
    """A task, if ``service`` has its present spec; it is looked up, and not relied on."""
    present = tx.lookup(Service, service.id)
    assert present is not None
    is_present = present.spec_version == service.spec_version
    return tx.put(a_task(f"t{len(tx.ids(Task))}", service=present)) if is_present else None
