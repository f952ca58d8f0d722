"""The contract of the store: what every part of a manager relies on, in memory and on a real etcd."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from msgspec.structs import replace

from skep.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfSequence,
    ResourceExhausted,
    SkepError,
    Unavailable,
)
from skep.model.container import ConfigReference, ContainerSpec, SecretReference
from skep.model.ids import ConfigId, NetworkId, SecretId, ServiceId, TaskId
from skep.model.meta import Version
from skep.model.network import Network, NetworkSpec
from skep.model.node import Node, NodeSession
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import (
    Endpoint,
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
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.times import Timestamp
from skep.store.interface import (
    Commit,
    Created,
    Deleted,
    InUse,
    NotLeader,
    Store,
    Transaction,
    Updated,
    Watch,
)
from skep.store.kinds import Payload, SpecVersion
from tests.builders import a_node, a_service, a_service_spec, a_task
from tests.contract.store_rigs import FIRST, Rig, etcd_rig, memory_rig

T = TypeVar("T", bound=msgspec.Struct)

pytestmark = pytest.mark.point("3")


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.needs("etcd", "setpriv"))])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with memory_rig() if request.param == "memory" else etcd_rig(tmp_path) as rig:
        yield rig


@pytest.fixture
def store(rig: Rig) -> Store:
    return rig.store


def put(tx: Transaction, object: T) -> T:
    return tx.put(object)


def delete(tx: Transaction, kind: type[Any], id: str) -> None:
    tx.delete(kind, id)


def change(tx: Transaction, kind: type[T], id: str, **fields: Any) -> T:
    return tx.put(replace(tx.get(kind, id), **fields))


async def eventually(holds: Callable[[], object]) -> None:
    """Return when ``holds()``; the test's own deadline bounds it."""
    while not holds():  # noqa: ASYNC110 - a replica announces no single revision to outsiders
        await asyncio.sleep(0.005)


async def shown(store: Store, kind: type[T], id: str) -> T:
    await eventually(lambda: store.view().lookup(kind, id))
    return store.view().get(kind, id)


async def outcome(doing: Awaitable[T]) -> T | SkepError:
    try:
        return await doing
    except SkepError as error:
        return error


def using(
    name: str,
    *,
    secrets: tuple[str, ...] = (),
    configs: tuple[str, ...] = (),
    networks: tuple[str, ...] = (),
    ports: tuple[PortConfig, ...] = (),
) -> Service:
    """A service that refers to objects by id."""
    container = ContainerSpec(
        image="busybox",
        secrets=tuple(SecretReference(secret_id=SecretId(id)) for id in secrets),
        configs=tuple(ConfigReference(config_id=ConfigId(id)) for id in configs),
    )
    attachments = tuple(NetworkAttachmentConfig(target=id) for id in networks)
    return Service(
        id=ServiceId(name),
        spec=ServiceSpec(
            name=name,
            task_template=TaskSpec(container_spec=container, networks=attachments),
            endpoint_spec=EndpointSpec(ports=ports) if ports else None,
        ),
    )


def a_secret(name: str) -> Secret:
    return Secret(id=SecretId(name), spec=SecretSpec(name=name))


def a_network(name: str) -> Network:
    return Network(id=NetworkId(name), spec=NetworkSpec(name=name))


def port(number: int, mode: PublishMode = PublishMode.INGRESS, protocol: str = "tcp") -> PortConfig:
    return PortConfig(published_port=number, target_port=80, protocol=protocol, publish_mode=mode)


# -- objects ---------------------------------------------------------------------------------------------------


async def test_an_object_comes_back_as_it_was_put(store: Store) -> None:
    wish = a_service("web", replicas=3, ports=(port(8080),))
    stored = await store.update(put, wish)
    assert stored.spec == wish.spec
    assert store.view().get(Service, wish.id) == stored


async def test_every_manager_sees_the_same_objects(rig: Rig) -> None:
    service = await rig.store.update(put, a_service("web"))
    task = await rig.store.update(put, a_task("t1", service=service))
    await rig.other.barrier()
    assert rig.other.view().get(Service, "web") == service
    assert rig.other.view().get(Task, "t1") == task


async def test_a_barrier_shows_what_was_acknowledged_elsewhere(rig: Rig) -> None:
    for number in range(50):
        await rig.store.update(put, a_secret(f"s{number}"))
        await rig.other.barrier()
        assert rig.other.view().lookup(Secret, f"s{number}") is not None


async def test_many_barriers_at_once_all_pass(rig: Rig) -> None:
    await rig.store.update(put, a_secret("s"))
    await asyncio.gather(*(rig.other.barrier() for _ in range(200)))
    assert rig.other.view().lookup(Secret, "s") is not None


async def test_finds_go_by_index_and_in_order_of_id(store: Store) -> None:
    def fill(tx: Transaction) -> None:
        for number in reversed(range(6)):
            tx.put(a_task(f"t{number}", slot=number, node=f"n{number % 2}", service="ab"[number // 3]))

    await store.update(fill)
    view = store.view()
    assert [task.id for task in view.find(Task)] == [f"t{number}" for number in range(6)]
    assert [task.id for task in view.find(Task, service_id="a")] == ["t0", "t1", "t2"]
    assert [task.id for task in view.find(Task, node_id="n1")] == ["t1", "t3", "t5"]
    assert [task.id for task in view.find(Task, slot="b/4")] == ["t4"]
    assert view.find(Task, node_id="nowhere") == []
    with pytest.raises(KeyError):
        view.find(Task, colour="green")


async def test_an_index_follows_the_object(store: Store) -> None:
    await store.update(put, a_task("t1", node=""))
    await store.update(change, Task, "t1", node_id="n1")
    assert [task.id for task in store.view().find(Task, node_id="n1")] == ["t1"]
    await store.update(change, Task, "t1", node_id="n2")
    assert store.view().find(Task, node_id="n1") == []
    await store.update(delete, Task, "t1")
    assert store.view().find(Task, node_id="n2") == []


async def test_a_transaction_sees_its_own_writes(store: Store) -> None:
    await store.update(put, a_task("t1", service="web"))

    def body(tx: Transaction) -> list[list[str]]:
        seen = []
        tx.put(a_task("t0", service="web"))
        seen.append([task.id for task in tx.find(Task, service_id="web")])
        tx.delete(Task, "t1")
        seen.append([task.id for task in tx.find(Task)])
        with pytest.raises(NotFound):
            tx.get(Task, "t1")
        return seen

    assert await store.update(body) == [["t0", "t1"], ["t0"]]
    assert [task.id for task in store.view().find(Task)] == ["t0"]


async def test_what_the_body_raises_is_raised_and_nothing_is_written(store: Store) -> None:
    def body(tx: Transaction) -> None:
        tx.put(a_secret("s"))
        raise OutOfSequence

    with pytest.raises(OutOfSequence):
        await store.update(body)
    assert store.view().lookup(Secret, "s") is None


async def test_a_body_that_writes_nothing_commits_nothing(store: Store) -> None:
    before = store.view().revision
    assert await store.update(lambda tx: len(tx.find(Service))) == 0
    assert store.view().revision == before


async def test_an_oversized_transaction_is_refused_whole(store: Store) -> None:
    def body(tx: Transaction) -> None:
        for number in range(200):
            tx.put(a_secret(f"s{number}"))

    with pytest.raises(ResourceExhausted, match="too large"):
        await store.update(body)
    assert store.view().find(Secret) == []


async def test_the_largest_transaction_fits_for_the_api_and_behind_the_fence(rig: Rig) -> None:
    """63 secrets are 126 keys, each written and compared; other writes go beside them."""

    def body(tx: Transaction, first: int) -> None:
        for number in range(first, first + 63):
            tx.put(a_secret(f"s{number}"))

    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    await asyncio.gather(
        rig.store.update(body, 0),
        term.update(body, 100),
        *(rig.store.update(put, a_task(f"t{number}")) for number in range(50)),
    )
    assert len(rig.store.view().find(Secret)) == 126
    assert len(rig.store.view().find(Task)) == 50
    with pytest.raises(ResourceExhausted, match="too large"):
        await rig.store.update(lambda tx: [tx.put(a_secret(f"x{number}")) for number in range(64)])


async def test_large_objects_do_not_add_up_beyond_what_one_request_may_hold(store: Store) -> None:
    def body(tx: Transaction) -> None:
        for id in "ab":
            tx.put(Config(id=ConfigId(id), spec=ConfigSpec(name=id, data=b"x" * 900_000)))

    with pytest.raises(ResourceExhausted, match="too large"):
        await store.update(body)


async def test_the_largest_config_fits_and_a_larger_one_is_refused(store: Store) -> None:
    largest = Config(id=ConfigId("c"), spec=ConfigSpec(name="c", data=b"\xff" * 1000 * 1024))
    await store.update(put, largest)
    assert store.view().get(Config, "c").spec.data == largest.spec.data
    with pytest.raises(ResourceExhausted):
        await store.update(put, Config(id=ConfigId("d"), spec=ConfigSpec(name="d", data=b"x" * 2_000_000)))


async def test_payloads_are_kept_and_never_printed(store: Store) -> None:
    await store.update(put, Payload(id="secret/s", data=b"\x00hidden\xff"))
    assert store.view().get(Payload, "secret/s").data == b"\x00hidden\xff"
    assert "hidden" not in repr(store.view().get(Payload, "secret/s"))


# -- versions and parts ----------------------------------------------------------------------------------------


async def test_the_version_grows_with_the_wish_and_only_with_it(store: Store) -> None:
    first = await store.update(put, a_node("n1"))
    reported = await store.update(change, Node, "n1", status=replace(first.status, message="fine"))
    assert reported.version == first.version
    assert reported.updated_at == first.updated_at
    wished = await store.update(change, Node, "n1", spec=replace(first.spec, labels={"a": "b"}))
    assert wished.version > first.version
    assert wished.created_at == first.created_at
    assert store.view().get(Node, "n1") == wished


async def test_a_version_is_never_below_a_revision_its_writer_had_seen(store: Store) -> None:
    for number in range(5):
        await store.update(put, a_secret(f"s{number}"))
    seen = store.view().revision
    assert (await store.update(put, a_secret("last"))).version.index >= seen


async def test_two_writers_of_different_parts_do_not_disturb_each_other(rig: Rig) -> None:
    await rig.store.update(put, a_node("n1"))
    await rig.other.barrier()
    node = rig.store.view().get(Node, "n1")

    def by_lookup(**fields: Any) -> Callable[[Transaction], Node]:
        def body(tx: Transaction) -> Node:
            found = tx.lookup(Node, "n1")
            assert found is not None
            return tx.put(replace(found, **fields))

        return body

    await asyncio.gather(
        rig.store.update(by_lookup(spec=replace(node.spec, labels={"x": "1"}))),
        rig.other.update(by_lookup(status=replace(node.status, message="up"))),
    )
    await rig.store.barrier()
    merged = rig.store.view().get(Node, "n1")
    assert (merged.spec.labels, merged.status.message) == ({"x": "1"}, "up")


async def test_a_part_is_not_written_for_an_object_that_is_gone(rig: Rig) -> None:
    await rig.store.update(put, a_task("t1"))
    await rig.other.barrier()
    for other, report in ((rig.store, rig.other), (rig.other, rig.store)):
        await other.update(put, a_task("t2"))
        await report.barrier()

        def running(tx: Transaction) -> None:
            task = tx.lookup(Task, "t2")
            if task is not None:
                tx.put(replace(task, status=TaskStatus(state=TaskState.COMPLETE, message="done")))

        await asyncio.gather(other.update(delete, Task, "t2"), report.update(running))
        await rig.store.barrier()
        assert rig.store.view().lookup(Task, "t2") is None


async def test_a_new_spec_drops_the_answers_to_the_old_one(rig: Rig) -> None:
    service = await rig.store.update(put, a_service("web"))
    assert service.spec_version == service.version
    answered = await rig.store.update(
        change, Service, "web", update_status=UpdateStatus(state=UpdateState.COMPLETED)
    )
    assert answered.spec_version == service.spec_version
    changed = await rig.store.update(change, Service, "web", spec=a_service_spec("web", replicas=7))
    assert changed.update_status is None
    assert changed.spec_version == changed.version
    await rig.other.barrier()
    assert rig.other.view().get(Service, "web") == rig.store.view().get(Service, "web") == changed


async def test_an_answer_that_comes_too_late_is_dropped(rig: Rig) -> None:
    """The leader answers the spec it has seen, while a user already writes another."""
    service = await rig.store.update(put, a_service("web"))
    await rig.other.barrier()

    def answer(tx: Transaction) -> None:
        seen = tx.lookup(Service, "web")
        assert seen is not None
        if seen.spec_version == service.spec_version:
            tx.put(replace(seen, update_status=UpdateStatus(state=UpdateState.UPDATING)))

    await asyncio.gather(
        rig.store.update(change, Service, "web", spec=a_service_spec("web", replicas=2)),
        rig.other.update(answer),
    )
    await rig.store.barrier()
    await rig.other.barrier()
    assert rig.store.view().get(Service, "web").update_status is None
    assert rig.other.view().get(Service, "web").update_status is None


async def test_a_tasks_spec_is_that_of_the_version_it_follows(rig: Rig) -> None:
    old = await rig.store.update(put, a_service("web", image="busybox:1"))
    await rig.store.update(put, a_task("t1", service=old))
    new = await rig.store.update(change, Service, "web", spec=a_service_spec("web", image="busybox:2"))
    await rig.store.update(put, replace(a_task("t2", service=new), spec=TaskSpec()))
    await rig.other.barrier()
    for store in (rig.store, rig.other):
        images = [
            task.spec.container_spec.image
            for task in store.view().find(Task, service_id="web")
            if task.spec.container_spec
        ]
        assert images == ["busybox:1", "busybox:2"]
        assert [version.index for version in store.view().find(SpecVersion, service_id="web")] == [
            old.version.index,
            new.version.index,
        ]


async def test_removing_a_service_removes_its_specs(store: Store) -> None:
    await store.update(put, a_service("web"))
    await store.update(change, Service, "web", spec=a_service_spec("web", replicas=2))
    await store.update(delete, Service, "web")
    assert store.view().find(SpecVersion) == []


async def test_a_session_is_taken_by_compare_and_swap(rig: Rig) -> None:
    await rig.store.update(put, a_node("n1"))
    await rig.other.barrier()

    def take(tx: Transaction, manager: str) -> bool:
        node = tx.rely_on(Node, "n1", "session")
        assert node is not None
        if node.session is not None:
            return False
        tx.put(replace(node, session=NodeSession(manager_id=manager)))  # type: ignore[arg-type]
        return True

    taken = await asyncio.gather(rig.store.update(take, "m1"), rig.other.update(take, "m2"))
    assert sorted(taken) == [False, True]


# -- names, ports, references ----------------------------------------------------------------------------------


async def test_names_are_unique_without_regard_to_case(store: Store) -> None:
    await store.update(put, using("web"))
    with pytest.raises(AlreadyExists) as taken:
        await store.update(put, replace(using("Web"), id=ServiceId("x")))
    assert str(taken.value) == "name conflicts with an existing object: service Web already exists"
    await store.update(put, a_secret("web"))
    with pytest.raises(AlreadyExists, match=r"^secret web already exists$"):
        await store.update(put, replace(a_secret("web"), id=SecretId("x")))


async def test_of_many_creators_of_one_name_one_wins(rig: Rig) -> None:
    def create(number: int) -> Service:
        return replace(using("web"), id=ServiceId(f"s{number}"))

    results = await asyncio.gather(
        *(
            outcome((rig.store if number % 2 else rig.other).update(put, create(number)))
            for number in range(50)
        )
    )
    assert sum(isinstance(result, Service) for result in results) == 1
    assert sum(isinstance(result, AlreadyExists) for result in results) == 49


async def test_a_name_is_free_again_after_renaming_and_removal(store: Store) -> None:
    await store.update(put, using("web"))
    await store.update(change, Service, "web", spec=a_service_spec("www"))
    await store.update(put, replace(using("web"), id=ServiceId("second")))
    await store.update(delete, Service, "second")
    await store.update(put, replace(using("web"), id=ServiceId("third")))


async def test_two_objects_may_swap_their_names_in_one_transaction(store: Store) -> None:
    await store.update(put, using("a"))
    await store.update(put, using("b"))

    def swap(tx: Transaction) -> None:
        a, b = tx.get(Service, "a"), tx.get(Service, "b")
        tx.put(replace(a, spec=replace(a.spec, name="c")))
        tx.put(replace(b, spec=replace(b.spec, name="a")))
        tx.put(replace(a, spec=replace(a.spec, name="b")))

    await store.update(swap)
    assert store.view().resolve(Service, "b").id in ("a", "b")
    assert [service.id for service in store.view().find(Service, name="a")] == ["b"]
    assert [service.id for service in store.view().find(Service, name="b")] == ["a"]


async def test_a_removed_service_frees_its_name_and_ports_and_is_not_found_by_name(store: Store) -> None:
    await store.update(put, a_secret("key"))
    await store.update(put, using("web", secrets=("key",), ports=(port(8080),)))
    await store.update(change, Service, "web", removed_at=Timestamp("2026-01-01T00:00:00Z"))
    for word in ("web", "we"):
        with pytest.raises(NotFound, match=f"service {word} not found"):
            store.view().resolve(Service, word)
    assert store.view().find(Service, name="web") == []
    assert [service.id for service in store.view().find(Service)] == ["web"]
    await store.update(put, replace(using("web", ports=(port(8080),)), id=ServiceId("next")))
    await store.update(delete, Secret, "key")
    assert store.view().resolve(Service, "web").id == "next"


async def test_a_published_port_has_one_owner(store: Store) -> None:
    await store.update(put, using("web", ports=(port(8080),)))
    with pytest.raises(InvalidArgument) as taken:
        await store.update(put, using("www", ports=(port(8080),)))
    assert str(taken.value) == "port '8080' is already in use by service 'web' (web) as an ingress port"
    await store.update(put, using("dns", ports=(port(8080, protocol="udp"),)))


async def test_host_ports_are_shared_with_each_other_and_with_no_ingress_port(store: Store) -> None:
    await store.update(put, using("a", ports=(port(80, PublishMode.HOST),)))
    await store.update(put, using("b", ports=(port(80, PublishMode.HOST),)))
    with pytest.raises(InvalidArgument) as taken:
        await store.update(put, using("c", ports=(port(80),)))
    assert str(taken.value) == "port '80' is already in use by service 'a' (a) as a host-published port"
    await store.update(delete, Service, "a")
    await store.update(delete, Service, "b")
    await store.update(put, using("c", ports=(port(80),)))
    with pytest.raises(InvalidArgument, match="as an ingress port"):
        await store.update(put, using("d", ports=(port(80, PublishMode.HOST),)))


async def test_a_port_given_by_the_allocator_is_owned_too(store: Store) -> None:
    await store.update(put, using("web"))
    await store.update(change, Service, "web", endpoint=Endpoint(ports=(port(30000),)))
    with pytest.raises(InvalidArgument, match="'30000' is already in use"):
        await store.update(put, using("www", ports=(port(30000),)))


async def test_what_is_used_cannot_be_removed(store: Store) -> None:
    def fill(tx: Transaction) -> None:
        tx.put(a_secret("key"))
        tx.put(Config(id=ConfigId("conf"), spec=ConfigSpec(name="conf")))
        tx.put(a_network("net"))

    await store.update(fill)
    await store.update(put, using("b", secrets=("key",), configs=("conf",), networks=("net",)))
    await store.update(put, using("a", secrets=("key",)))
    for kind, id, users in (
        (Secret, "key", [("service", "a"), ("service", "b")]),
        (Config, "conf", [("service", "b")]),
        (Network, "net", [("service", "b")]),
    ):
        with pytest.raises(InUse) as used:
            await store.update(delete, kind, id)
        assert list(used.value.users) == users

    def remove_all(tx: Transaction) -> None:
        for id in ("a", "b"):
            tx.delete(Service, id)
        tx.delete(Secret, "key")
        tx.delete(Network, "net")

    await store.update(remove_all)
    assert store.view().find(Secret) == []


async def test_a_reference_to_nothing_is_refused(store: Store) -> None:
    with pytest.raises(NotFound, match="secret key not found"):
        await store.update(put, using("web", secrets=("key",)))
    assert store.view().find(Service) == []


async def test_an_object_and_what_it_needs_may_be_created_together(store: Store) -> None:
    def both(tx: Transaction) -> None:
        tx.put(a_secret("key"))
        tx.put(using("web", secrets=("key",)))

    await store.update(both)
    with pytest.raises(InUse):
        await store.update(delete, Secret, "key")


RACES = 1000
AT_ONCE = 100


async def race(rig: Rig, create: Callable[[int], Service], remove: tuple[type[Any], str], first: T) -> None:
    """``RACES`` times a service that needs something beside the removal of that thing: never both, never neither."""
    kind, prefix = remove
    made = removed = 0

    async def one(number: int) -> None:
        nonlocal made, removed
        creator, remover = (rig.store if number % 3 else rig.other), rig.other
        creating = outcome(creator.update(put, create(number)))
        removing = outcome(remover.update(delete, kind, f"{prefix}{number}"))
        if number % 2:
            results = await asyncio.gather(creating, removing)
        else:
            results = list(reversed(await asyncio.gather(removing, creating)))
        match results:
            case [Service(), InUse()]:
                made += 1
            case [NotFound(), None]:
                removed += 1
            case _:
                pytest.fail(f"race {number} ended with {results}")

    for start in range(0, RACES, AT_ONCE):
        await rig.store.update_each(
            lambda tx, number: tx.put(
                replace(first, id=f"{prefix}{number}", spec=replace(first.spec, name=f"{prefix}{number}"))  # type: ignore[attr-defined]
            ),
            range(start, start + AT_ONCE),
        )
        await rig.other.barrier()
        await asyncio.gather(*map(one, range(start, start + AT_ONCE)))
    await rig.store.barrier()
    assert made + removed == RACES
    assert made
    assert removed
    assert len(rig.store.view().find(Service)) == made == len(rig.store.view().find(kind))


async def test_a_service_and_the_removal_of_its_secret_never_both_succeed(rig: Rig) -> None:
    await race(rig, lambda n: using(f"s{n}", secrets=(f"x{n}",)), (Secret, "x"), a_secret("x"))


async def test_a_service_and_the_removal_of_its_network_never_both_succeed(rig: Rig) -> None:
    await race(rig, lambda n: using(f"s{n}", networks=(f"x{n}",)), (Network, "x"), a_network("x"))


async def test_two_services_never_get_one_port(rig: Rig) -> None:
    async def one(number: int) -> None:
        first = rig.store if number % 2 else rig.other
        mode = PublishMode.HOST if number % 3 == 0 else PublishMode.INGRESS
        results = await asyncio.gather(
            outcome(first.update(put, using(f"a{number}", ports=(port(10_000 + number),)))),
            outcome(rig.other.update(put, using(f"b{number}", ports=(port(10_000 + number, mode),)))),
        )
        kinds = sorted(type(result).__name__ for result in results)
        assert kinds == ["InvalidArgument", "Service"], f"race {number} ended with {results}"

    for start in range(0, RACES, AT_ONCE):
        await asyncio.gather(*map(one, range(start, start + AT_ONCE)))
    await rig.store.barrier()
    assert len(rig.store.view().find(Service)) == RACES


# -- concurrency -----------------------------------------------------------------------------------------------


async def test_no_update_is_lost_among_many_writers(rig: Rig) -> None:
    await rig.store.update(put, a_node("n1"))
    await rig.other.barrier()

    def count(tx: Transaction) -> None:
        node = tx.get(Node, "n1")
        number = int(node.spec.labels.get("count", "0"))
        tx.put(replace(node, spec=replace(node.spec, labels={"count": str(number + 1)})))

    await asyncio.gather(*((rig.store if n % 2 else rig.other).update(count) for n in range(60)))
    await rig.store.barrier()
    assert rig.store.view().get(Node, "n1").spec.labels == {"count": "60"}


async def test_a_commit_fails_when_what_it_relied_on_has_changed(rig: Rig) -> None:
    """A task is only made for a service that is still there."""
    await rig.store.update(put, a_service("web"))
    await rig.other.barrier()

    def make(tx: Transaction, number: int) -> bool:
        if tx.rely_on(Service, "web") is None:
            return False
        tx.put(a_task(f"t{number}"))
        return True

    made = await asyncio.gather(
        rig.store.update(delete, Service, "web"), *(rig.other.update(make, n) for n in range(20))
    )
    await rig.store.barrier()
    revisions = [task.version.index for task in rig.store.view().find(Task)]
    assert len(revisions) == sum(bool(one) for one in made[1:])
    after = await rig.other.update(make, 99)
    assert after is False


async def test_update_each_commits_what_it_can(rig: Rig) -> None:
    await rig.store.update(put, a_service("web"))

    def make(tx: Transaction, number: int) -> Task:
        if number % 10 == 3:
            raise FailedPrecondition(f"not {number}")
        return tx.put(a_task(f"t{number:04}", slot=number))

    results = await rig.store.update_each(make, range(1000))
    assert [type(result).__name__ for result in results[:5]] == [
        "Task",
        "Task",
        "Task",
        "FailedPrecondition",
        "Task",
    ]
    assert len(results) == 1000
    assert len(rig.store.view().find(Task)) == 900
    again = await rig.store.update_each(
        lambda tx, task: tx.put(replace(tx.get(Task, task.id), desired_state=TaskState.SHUTDOWN)),
        rig.store.view().find(Task),
    )
    assert all(isinstance(result, Task) for result in again)
    assert all(task.desired_state is TaskState.SHUTDOWN for task in rig.store.view().find(Task))


async def test_update_each_runs_items_that_met_a_conflict_again(rig: Rig) -> None:
    await rig.store.update(put, a_node("n1"))

    def count(tx: Transaction, _: int) -> None:
        node = tx.get(Node, "n1")
        number = int(node.spec.labels.get("count", "0"))
        tx.put(replace(node, spec=replace(node.spec, labels={"count": str(number + 1)})))

    assert await rig.store.update_each(count, range(20)) == [None] * 20
    assert rig.store.view().get(Node, "n1").spec.labels == {"count": "20"}


# -- resolving -------------------------------------------------------------------------------------------------


async def test_a_word_means_an_id_then_a_name_then_a_prefix(store: Store) -> None:
    def fill(tx: Transaction) -> None:
        tx.put(replace(using("bcd"), id=ServiceId("abc")))
        tx.put(replace(using("abc"), id=ServiceId("xyz1")))
        tx.put(replace(using("xyz"), id=ServiceId("bcd1")))
        tx.put(replace(using("other"), id=ServiceId("xyz2")))

    await store.update(fill)
    resolve = store.view().resolve
    assert resolve(Service, "abc").id == "abc"
    assert resolve(Service, "BCD").id == "abc"
    assert resolve(Service, "xyz").id == "bcd1"
    assert resolve(Service, "bcd1").id == "bcd1"
    with pytest.raises(InvalidArgument, match=r"^service xy is ambiguous \(2 matches found\)$"):
        resolve(Service, "xy")
    with pytest.raises(NotFound, match=r"^service zzz not found$"):
        resolve(Service, "zzz")
    with pytest.raises(NotFound):
        resolve(Service, "")


async def test_a_node_is_meant_by_its_host_name_unless_several_have_it(store: Store) -> None:
    def fill(tx: Transaction) -> None:
        for id, hostname in (("n1", "web"), ("n2", "db"), ("n3", "DB")):
            node = a_node(id)
            tx.put(replace(node, description=replace(node.description, hostname=hostname)))

    await store.update(fill)
    assert store.view().resolve(Node, "WEB").id == "n1"
    with pytest.raises(InvalidArgument, match=r"node db is ambiguous \(2 matches found\)"):
        store.view().resolve(Node, "db")


async def test_a_task_is_meant_by_its_whole_name(store: Store) -> None:
    service = await store.update(put, a_service("web"))
    await store.update(put, a_task("t1", slot=3, service=service))
    assert store.view().resolve(Task, "web.3.t1").id == "t1"
    assert store.view().resolve(Task, "t").id == "t1"
    with pytest.raises(NotFound):
        store.view().resolve(Task, "web.2.t1")


# -- watching --------------------------------------------------------------------------------------------------


async def taken(watch: Watch, number: int) -> list[Commit]:
    commits: list[Commit] = []
    async for commit in watch:
        commits.append(commit)
        if len(commits) == number:
            break
    return commits


async def test_a_watch_goes_on_where_its_snapshot_ends(rig: Rig) -> None:
    """Writers never pause; snapshot and events together are everything, each once."""

    async def write() -> None:
        for number in range(300):
            await rig.store.update(put, a_task(f"t{number:03}"))

    async with asyncio.TaskGroup() as group:
        writing = group.create_task(write())
        for pause in (0, 1, 2):
            await eventually(lambda pause=pause: len(rig.other.view().find(Task)) > pause * 80)
            async with rig.other.watch(Task) as watch:
                known = [task.id for task in watch.snapshot.find(Task)]
                async for commit in watch:
                    for event in commit.events:
                        assert isinstance(event, Created)
                        known.append(event.object.id)  # type: ignore[attr-defined]
                    if len(known) >= pause * 80 + 60:
                        break
            assert known == [f"t{number:03}" for number in range(len(known))]
        await writing


async def test_a_commit_shows_all_changes_of_one_transaction_at_once(rig: Rig) -> None:
    await rig.store.update(put, a_task("t1"))
    await rig.other.barrier()
    async with rig.other.watch() as watch:

        def body(tx: Transaction) -> None:
            tx.put(replace(tx.get(Task, "t1"), node_id="n1", status=TaskStatus(state=TaskState.FAILED)))  # type: ignore[arg-type]
            tx.put(a_secret("s"))

        await rig.store.update(body)
        (commit,) = await taken(watch, 1)
    assert len(commit.events) == 2
    updates = [event for event in commit.events if isinstance(event, Updated)]
    assert [(event.old.node_id, event.new.node_id) for event in updates] == [("", "n1")]  # type: ignore[attr-defined]
    assert updates[0].new.status.state is TaskState.FAILED  # type: ignore[attr-defined]


async def test_a_watch_hears_only_of_its_kinds(rig: Rig) -> None:
    async with rig.store.watch(Secret) as watch:
        await rig.store.update(put, a_task("t1"))
        await rig.store.update(put, a_secret("s"))
        await rig.store.update(delete, Secret, "s")
        events = [event for commit in await taken(watch, 2) for event in commit.events]
    match events:
        case [Created(Secret(id="s")), Deleted(Secret(id="s"))]:
            pass
        case _:
            pytest.fail(f"{events}")


async def test_a_replica_that_was_away_resumes_without_a_gap(rig: Rig) -> None:
    await rig.store.update(put, a_task("t0"))
    await rig.other.barrier()
    async with rig.other.watch(Task) as watch:
        rig.cut_other()
        for number in range(1, 6):
            await rig.store.update(put, a_task(f"t{number}"))
        rig.mend()
        created = [event.object.id for commit in await taken(watch, 5) for event in commit.events]  # type: ignore[union-attr]
    assert created == ["t1", "t2", "t3", "t4", "t5"]


async def test_after_compaction_a_replica_loads_again_and_tells_exactly_the_difference(rig: Rig) -> None:
    def fill(tx: Transaction) -> None:
        for number in range(4):
            tx.put(a_task(f"t{number}"))

    await rig.store.update(fill)
    await rig.other.barrier()
    async with rig.other.watch() as watch:
        rig.cut_other()
        await rig.store.update(delete, Task, "t0")
        await rig.store.update(change, Task, "t1", node_id="n1")
        await rig.store.update(change, Task, "t1", node_id="n2")
        await rig.store.update(put, a_secret("fleeting"))
        await rig.store.update(delete, Secret, "fleeting")
        await rig.store.update(put, a_task("t9"))
        await rig.compact()
        rig.mend()
        (commit,) = await taken(watch, 1)
        heard = [(type(event).__name__, event) for event in commit.events]
        assert [name for name, _ in heard] == ["Deleted", "Updated", "Created"]
        match [event for _, event in heard]:
            case [
                Deleted(Task(id="t0")),
                Updated(Task(id="t1", node_id=""), Task(id="t1", node_id="n2")),
                Created(Task(id="t9")),
            ]:
                pass
            case events:
                pytest.fail(f"{events}")
        await rig.store.update(put, a_secret("later"))
        (after,) = await taken(watch, 1)
        assert [type(event).__name__ for event in after.events] == ["Created"]
    assert list(rig.other.view().find(Task)) == list(rig.store.view().find(Task))


# -- leadership ------------------------------------------------------------------------------------------------


async def test_a_leader_is_known_to_all(rig: Rig) -> None:
    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    await rig.other.barrier()
    assert rig.store.leader == rig.other.leader == FIRST
    assert await term.update(put, a_secret("s")) == term.view().get(Secret, "s")


async def test_a_deposed_leader_writes_nothing(rig: Rig) -> None:
    term = await anext(rig.store.terms(FIRST, "127.0.0.1:2377"))
    await term.update(put, a_secret("before"))
    await rig.depose()
    with pytest.raises(NotLeader):
        await term.update(put, a_secret("after"))
    assert [type(result) for result in await term.update_each(put, [a_secret("x"), a_secret("y")])] == [
        NotLeader,
        NotLeader,
    ]
    async with asyncio.timeout(5):
        await term.wait_lost()
    await rig.store.barrier()
    assert [secret.id for secret in rig.store.view().find(Secret)] == ["before"]
    await rig.store.update(put, a_secret("by the API"))


# -- faults ----------------------------------------------------------------------------------------------------


async def test_a_write_whose_request_got_lost_is_sent_again(rig: Rig) -> None:
    rig.lose_request()
    await rig.store.update(put, using("web"))
    await rig.other.barrier()
    assert [service.id for service in rig.other.view().find(Service)] == ["web"]


async def test_a_write_whose_answer_got_lost_is_not_written_twice(rig: Rig) -> None:
    """The body would find its own name taken if it ran again on what it had written itself."""
    ids = iter(f"s{number}" for number in range(10))

    def create(tx: Transaction) -> Service:
        return tx.put(replace(using("web"), id=ServiceId(next(ids))))

    rig.lose_reply()
    async with asyncio.TaskGroup() as group:
        creating = group.create_task(rig.store.update(create))
        await eventually(lambda: rig.other.view().find(Service))
        rig.mend()
    assert creating.result().id == "s0"
    assert [service.id for service in rig.other.view().find(Service)] == ["s0"]


async def test_without_a_quorum_everything_fails_within_its_deadline(rig: Rig) -> None:
    rig.cut_store()
    async with asyncio.timeout(8):
        results = await asyncio.gather(
            outcome(rig.store.update(put, a_secret("s"))),  # type: ignore[arg-type]
            outcome(rig.store.barrier()),  # type: ignore[arg-type]
            outcome(rig.store.update(delete, Secret, "nothing")),  # type: ignore[arg-type]
        )
    assert [type(result) for result in results] == [Unavailable] * 3
    assert "does not have a leader" in str(results[0])
    rig.mend()
    await rig.store.barrier()
    await rig.store.update(put, a_secret("later"))
    assert rig.store.view().get(Swarm, "cluster")


async def test_an_error_is_only_believed_on_a_state_no_older_than_the_call(rig: Rig) -> None:
    """A replica that is behind must not say "not found" of what another manager has acknowledged."""
    for number in range(30):
        await rig.store.update(put, a_secret(f"s{number}"))
        await rig.other.update(delete, Secret, f"s{number}")
    with pytest.raises(NotFound):
        await rig.other.update(delete, Secret, "s0")


async def test_the_version_that_a_user_gives_is_compared_with_the_present_one(rig: Rig) -> None:
    def scale(tx: Transaction, version: Version, replicas: int) -> Service:
        service = tx.get(Service, "web")
        if service.version != version:
            raise OutOfSequence
        return tx.put(replace(service, spec=a_service_spec("web", replicas=replicas)))

    first = await rig.store.update(put, a_service("web"))
    await rig.other.barrier()
    results = await asyncio.gather(
        *(outcome((rig.store, rig.other)[n % 2].update(scale, first.version, n)) for n in range(2, 12))
    )
    assert sum(isinstance(result, Service) for result in results) == 1
    assert sum(isinstance(result, OutOfSequence) for result in results) == 9


async def test_ids_of_tasks_do_not_bring_them_together(store: Store) -> None:
    """Keys of one object are no prefix of another's."""
    for id in ("ab", "ab-c", "ab0", "a"):
        await store.update(put, a_task(id, state=TaskState.RUNNING))
    await store.update(delete, Task, TaskId("ab"))
    assert [task.id for task in store.view().find(Task)] == ["a", "ab-c", "ab0"]
    assert all(task.status.state is TaskState.RUNNING for task in store.view().find(Task))
