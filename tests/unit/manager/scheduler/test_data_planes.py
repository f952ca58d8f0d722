"""Tasks of overlay networks stay on nodes of the data plane that their networks belong to."""

from msgspec.structs import replace

from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import planes_of, requirements_of
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import Placed, place
from skep.model.network import Network
from skep.model.networks.data_planes import DOCKER, SKEP
from skep.model.service import Service
from skep.model.task import NetworkAttachment, Task
from tests.support.builders import a_docker_node, a_node, a_service, a_task, an_overlay
from tests.unit.manager.scheduler.test_placement import ALL, PENDING, accounting_of, nodes_of, reason


def on_network(service: Service, *networks: Network) -> Task:
    places = tuple(NetworkAttachment(network=network) for network in networks)
    return replace(a_task(service=service, state=PENDING), networks_attachments=places)


def placed_on(accounting: Accounting, *networks: Network) -> Placed:
    service = a_service()
    task = on_network(service, *networks)
    known = {network.id: network for network in networks}
    requirements = requirements_of(task, service.spec, planes_of(task, known.get))
    return place([task], requirements, CachedSpreads(accounting), now=0.0, limit=ALL)


def test_tasks_of_an_overlay_stay_on_nodes_of_its_data_plane() -> None:
    accounting = accounting_of([a_node("w1"), a_docker_node("d1")])
    assert nodes_of(placed_on(accounting, an_overlay(plane=DOCKER))) == {"d1": 1}
    assert nodes_of(placed_on(accounting, an_overlay("net2", plane=SKEP, subnet=""))) == {"w1": 1}


def test_a_task_whose_data_plane_has_no_node_says_so() -> None:
    engines = accounting_of([a_docker_node("d1"), a_docker_node("d2")])
    assert reason(placed_on(engines, an_overlay(plane=SKEP))) == (
        "no suitable node (overlay network belongs to skep nodes, which does not fit 2 nodes)"
    )
    ours = accounting_of([a_node("w1")])
    assert reason(placed_on(ours, an_overlay(plane=DOCKER))) == (
        "no suitable node (overlay network belongs to docker nodes, which does not fit 1 node)"
    )
    both = accounting_of([a_node("w1"), a_docker_node("d1")])
    assert "docker nodes, which does not fit 1 node; overlay network belongs to skep nodes" in reason(
        placed_on(both, an_overlay(plane=DOCKER), an_overlay("net2", plane=SKEP))
    )


def test_the_plane_that_a_network_has_now_counts_not_that_of_the_tasks_copy() -> None:
    undecided, decided = an_overlay(), an_overlay(plane=SKEP)
    task = on_network(a_service(), undecided)
    assert planes_of(task, {undecided.id: undecided}.get) == ()
    assert planes_of(task, {decided.id: decided}.get) == (SKEP,)


def test_while_no_plane_is_decided_a_node_has_to_have_overlays_at_all() -> None:
    accounting = accounting_of([a_node("w1"), a_docker_node("d1")])
    assert nodes_of(placed_on(accounting, an_overlay())) == {"d1": 1}
    assert reason(placed_on(accounting_of([a_node("w1")]), an_overlay())) == (
        "no suitable node (missing plugin on 1 node)"
    )


def test_the_ingress_network_lies_on_both_planes() -> None:
    ingress = an_overlay("ingress", subnet="10.0.0.0/24", ingress=True)
    assert nodes_of(placed_on(accounting_of([a_node("w1")]), ingress)) == {"w1": 1}
