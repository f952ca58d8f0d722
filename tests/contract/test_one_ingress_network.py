"""There is one ingress network, and as long as a service publishes by it, whichever managers are asked at once."""

import asyncio

from skep.api.formats.service_form import settled
from skep.errors import AlreadyExists, FailedPrecondition
from skep.manager.control.networks import create_network, remove_network
from skep.manager.control.services import create_service, remove_service
from skep.model.network import Network, NetworkSpec
from skep.model.service import PortConfig, Service, ServiceSpec
from skep.model.values.ids import new_id
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.interface import Store
from tests.support.builders import a_service_spec
from tests.support.store.store_rigs import Rig
from tests.support.store.store_transactions import outcome

NOW = Timestamp("2026-01-02T03:04:05Z")
RACES = 20


async def an_ingress(store: Store, name: str) -> Network:
    spec = NetworkSpec(name=name, ingress=True, driver_configuration=Driver(name="overlay"))
    return await store.update(create_network, spec, new_id=new_id, now=NOW)


def publishing(name: str) -> ServiceSpec:
    return settled(a_service_spec(name, ports=(PortConfig(target_port=80),)))


async def a_publisher(store: Store, name: str) -> Service:
    return await store.update(create_service, publishing(name), new_id=new_id, new_name=str, now=NOW)


async def test_of_two_ingress_networks_created_at_once_one_is_refused(rig: Rig) -> None:
    for number in range(RACES):
        await rig.other.barrier()
        results = await asyncio.gather(
            outcome(an_ingress(rig.store, f"a{number}")), outcome(an_ingress(rig.other, f"b{number}"))
        )
        await rig.store.barrier()
        (made,) = rig.store.view().find(Network)
        (refused,) = (one for one in results if one != made)
        assert isinstance(refused, AlreadyExists)
        assert str(refused) == f"ingress network ({made.id}) is already present"
        await rig.store.update(remove_network, made.id)


async def test_a_service_that_publishes_and_the_removal_of_the_ingress_network_never_both_succeed(
    rig: Rig,
) -> None:
    for number in range(RACES):
        network = await an_ingress(rig.store, "ingress")
        await rig.other.barrier()
        creator, remover = (rig.store, rig.other) if number % 2 else (rig.other, rig.store)
        creating = outcome(a_publisher(creator, "web"))
        removing = outcome(remover.update(remove_network, network.id))
        if number % 3:
            made, removed = await asyncio.gather(creating, removing)
        else:
            removed, made = await asyncio.gather(removing, creating)
        match made, removed:
            case FailedPrecondition(), None:
                assert str(made) == "service needs ingress network, but no ingress network is present"
            case Service(), FailedPrecondition():
                assert (
                    str(removed)
                    == f"ingress network cannot be removed because service {made.id} depends on it"
                )
                await rig.store.barrier()
                await rig.store.update(remove_service, made.id, now=NOW)
                await rig.store.update(remove_network, network.id)
            case both:
                raise AssertionError(f"race {number} ended with {both}")
