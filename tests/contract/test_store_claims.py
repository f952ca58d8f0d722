"""The contract of the store: unique names and ports, references, and the races for them."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import pytest
from msgspec.structs import replace

from skep.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
)
from skep.model.network import IPAMConfig, IPAMOptions, Network
from skep.model.networks.overlays import VXLAN_OPTION
from skep.model.secret import Config, ConfigSpec, Secret
from skep.model.service import (
    Endpoint,
    PublishMode,
    Service,
)
from skep.model.values.ids import ConfigId, SecretId, ServiceId
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.interface import (
    InUse,
    Store,
    Transaction,
)
from tests.support.builders import a_service_spec
from tests.support.store.store_rigs import Rig
from tests.support.store.store_transactions import (
    a_network,
    a_secret,
    change,
    delete,
    outcome,
    port,
    put,
    using,
)

T = TypeVar("T", bound=msgspec.Struct)


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
        assert kinds == ["PortTaken", "Service"], f"race {number} ended with {results}"

    for start in range(0, RACES, AT_ONCE):
        await asyncio.gather(*map(one, range(start, start + AT_ONCE)))
    await rig.store.barrier()
    assert len(rig.store.view().find(Service)) == RACES


def overlay(id: str, vxlan_id: int, subnet: str) -> Network:
    """A network as the leader has allocated it."""
    return replace(
        a_network(id),
        driver_state=Driver(name="overlay", options={VXLAN_OPTION: str(vxlan_id)}),
        ipam_options=IPAMOptions(configs=(IPAMConfig(subnet=subnet),)),
    )


async def test_a_vxlan_id_and_a_subnet_have_one_owner_until_it_is_removed(store: Store) -> None:
    await store.update(put, overlay("a", 4096, "10.0.0.0/24"))
    with pytest.raises(AlreadyExists, match=r"^VXLAN id 4096 belongs to network a \(a\)$"):
        await store.update(put, overlay("b", 4096, "10.0.1.0/24"))
    with pytest.raises(AlreadyExists, match=r"^subnet 10\.0\.0\.0/24 belongs to network a \(a\)$"):
        await store.update(put, overlay("b", 4097, "10.0.0.7/24"))
    await store.update(delete, Network, "a")
    await store.update(put, overlay("b", 4096, "10.0.0.0/24"))


async def test_two_networks_never_get_one_vxlan_id_or_subnet(rig: Rig) -> None:
    """Two managers that both believe to lead, without a fence between them."""

    async def one(number: int) -> None:
        shared_id = number % 2 == 0
        ids = (5000 + number, 5000 + number if shared_id else 9000 + number)
        subnets = (f"10.{number}.0.0/24", f"10.{number}.{int(shared_id)}.0/24")
        results = await asyncio.gather(
            outcome(rig.store.update(put, overlay(f"a{number}", ids[0], subnets[0]))),
            outcome(rig.other.update(put, overlay(f"b{number}", ids[1], subnets[1]))),
        )
        assert sorted(type(result).__name__ for result in results) == ["AlreadyExists", "Network"]

    await asyncio.gather(*map(one, range(100)))


async def test_a_service_with_many_ports_and_references_comes_and_goes(store: Store) -> None:
    """150 ports and 500 secrets: Docker has no limit, and a published range has many ports."""
    secrets = tuple(f"s{number}" for number in range(500))
    await store.update_each(lambda tx, name: tx.put(a_secret(name)), secrets)
    ports = tuple(port(30_000 + number) for number in range(150))
    await store.update(put, using("web", secrets=secrets, ports=ports))
    with pytest.raises(InvalidArgument, match="port '30149' is already in use"):
        await store.update(put, using("other", ports=ports[-1:]))
    with pytest.raises(InUse):
        await store.update(delete, Secret, "s499")
    await store.update(change, Service, "web", removed_at=Timestamp("2026-01-01T00:00:00Z"))
    await store.update(put, using("other", ports=ports))
    await store.update(delete, Service, "web")
    await store.update(delete, Secret, "s499")
