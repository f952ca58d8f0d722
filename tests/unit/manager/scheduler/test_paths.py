"""Tasks on overlay networks keep away from nodes that others do not reach."""

from msgspec.structs import replace

from skep.manager.scheduler.explaining.explain import verdict
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import place
from skep.model.network import Network
from skep.model.networks.overlays import ENCRYPTED_OPTION
from skep.model.node import CutOff, EngineDescription, EnginePlugin, Node
from skep.model.options.labels import IGNORE_PATHS
from skep.model.task import NetworkAttachment, Task
from skep.model.values.meta import Driver
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.unit.manager.scheduler.test_placement import ALL, PENDING, accounting_of, nodes_of, reason

OVERLAY = CutOff(check="overlay", port="4789/udp", peers=("w2",))
ENCRYPTED = CutOff(check="encrypted", port="4799/udp", peers=("w2",))
NET = an_overlay("net1")
_NET2 = an_overlay("net2", subnet="10.0.2.0/24")
_OPTIONS = Driver(name="overlay", options={ENCRYPTED_OPTION: ""})
SECRET = replace(_NET2, spec=replace(_NET2.spec, driver_configuration=_OPTIONS))
INGRESS = an_overlay("ingress", subnet="10.0.0.0/24", ingress=True)
SERVICE = a_service()


def a_node_with_overlays(id: str, *cut_off: CutOff, labels: dict[str, str] | None = None) -> Node:
    node = a_node(id, labels=labels)
    engine = EngineDescription(plugins=(EnginePlugin(type="Network", name="overlay"),))
    return replace(node, description=replace(node.description, engine=engine), cut_off=cut_off)


def a_task_on(*networks: Network) -> Task:
    places = tuple(NetworkAttachment(network=network) for network in networks)
    return replace(a_task(service=SERVICE, state=PENDING), networks_attachments=places)


def taking(accounting: Accounting, *networks: Network) -> list[str]:
    """The nodes that would take a task on these networks."""
    requirements = requirements_of(a_task_on(*networks), SERVICE.spec)
    return [
        id for id, account in accounting.accounts.items() if not verdict(requirements, account, 0).reasons
    ]


def test_a_node_that_is_cut_off_takes_no_tasks_on_overlay_networks_and_all_others() -> None:
    accounting = accounting_of([a_node_with_overlays("w1", OVERLAY), a_node_with_overlays("w2")])
    assert taking(accounting, NET) == ["w2"]
    assert taking(accounting, INGRESS) == ["w2"]
    assert taking(accounting) == ["w1", "w2"]


def test_encrypted_networks_go_by_a_way_of_their_own() -> None:
    accounting = accounting_of([a_node_with_overlays("w1", OVERLAY), a_node_with_overlays("w2", ENCRYPTED)])
    assert taking(accounting, SECRET) == ["w1"]
    assert taking(accounting, NET) == ["w2"]
    assert taking(accounting, NET, SECRET) == []


def test_a_label_of_the_node_has_it_take_tasks_all_the_same() -> None:
    reported = a_node_with_overlays("w1", OVERLAY, labels={IGNORE_PATHS: "true"})
    assert taking(accounting_of([reported]), NET) == ["w1"]
    undecided = a_node_with_overlays("w1", OVERLAY, labels={IGNORE_PATHS: "maybe"})
    assert taking(accounting_of([undecided]), NET) == []


def test_a_task_that_finds_no_node_says_why_and_each_node_which_way_fails() -> None:
    accounting = accounting_of([a_node_with_overlays("w1", OVERLAY)])
    task = a_task_on(NET)
    requirements = requirements_of(task, SERVICE.spec)
    refused = place([task], requirements, CachedSpreads(accounting), now=0.0, limit=ALL)
    assert reason(refused) == "no suitable node (overlay traffic fails on 1 node)"
    (words,) = verdict(requirements, accounting.accounts[a_node("w1").id], 0).reasons
    assert words == (
        "4789/udp fails between this node and w2 (set the node's label skep.ignore-paths=true to allow it)"
    )


def test_a_node_that_is_well_again_is_chosen_at_once() -> None:
    accounting = accounting_of([a_node_with_overlays("w1", OVERLAY)])
    choices, task = CachedSpreads(accounting), a_task_on(NET)
    requirements = requirements_of(task, SERVICE.spec)
    assert nodes_of(place([task], requirements, choices, now=0.0, limit=ALL)) == {}
    accounting.set_node(a_node_with_overlays("w1"))
    assert nodes_of(place([task], requirements, choices, now=0.0, limit=ALL)) == {"w1": 1}
