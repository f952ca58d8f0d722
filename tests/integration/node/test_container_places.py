"""Containers under runc on overlay networks of their node."""

from skep.engine.engine import Engine
from skep.model.networks.sandbox import EndpointConfig
from skep.model.networks.tables import NetworkHead, Segment
from skep.model.values.ids import NetworkId, NodeId
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.runc_lab import Lab

WEB = NetworkHead(id=NetworkId("webnet"), name="web", segments=(Segment("10.0.1.0/24", "10.0.1.1", 4097),))
INNER = NetworkHead(
    id=NetworkId("innernet"),
    name="inner",
    segments=(Segment("10.0.2.0/24", "10.0.2.1", 4098),),
    is_internal=True,
)


async def test_a_container_is_reached_on_its_network(run: Runner, engine: Engine, lab: Lab) -> None:
    server = await run.start(
        *("httpd", "-f", "-p", "80", "-h", "/etc"),
        endpoints=(EndpointConfig(head=WEB, addresses=("10.0.1.5/24",)),),
    )
    command = "for i in $(seq 100); do wget -q -O - http://10.0.1.5/group && break; sleep 0.05; done"
    places = (
        EndpointConfig(head=WEB, addresses=("10.0.1.6/24",)),
        EndpointConfig(head=INNER, addresses=("10.0.2.6/24",)),
    )
    assert "staff" in await run.output("sh", "-c", command, endpoints=places)
    await engine.remove(server.id, force=True)
    assert lab.remains() == []
    await eventually(lambda: not list(lab.paths.overlays.iterdir()), "the network is removed")


async def test_the_hosts_file_names_the_container_on_each_network(run: Runner) -> None:
    places = (
        EndpointConfig(head=WEB, addresses=("10.0.1.6/24",)),
        EndpointConfig(head=INNER, addresses=("10.0.2.6/24",)),
    )
    lines = (await run.output("cat", "/etc/hosts", hostname="me", endpoints=places)).splitlines()
    assert lines[-2:] == ["10.0.1.6\tme", "10.0.2.6\tme"]


async def test_a_container_is_started_again_on_its_networks(run: Runner, engine: Engine) -> None:
    places = (EndpointConfig(head=INNER, addresses=("10.0.2.6/24",)),)
    container = await run.start("ip", "-o", "-4", "addr", endpoints=places)
    await engine.wait(container.id)
    await engine.start(container.id)
    await engine.wait(container.id)
    assert (await run.logs(container)).count("10.0.2.6/24") == 2


async def test_a_new_process_finds_the_interfaces_again(lab: Lab) -> None:
    """The container is reached all the time, and what it had is freed when it ends."""
    first = lab.executor()
    async with first.running():
        run = Runner(lab, first.engine)
        places = (EndpointConfig(head=WEB, addresses=("10.0.1.5/24",)),)
        server = await run.start("sleep", "1000", endpoints=places)
    second = lab.executor()
    async with second.running():
        run = Runner(lab, second.engine)
        await second.data_plane.overlays.apply(NodeId(""), {}, frozenset())
        assert second.engine.get(server.id).sandbox == server.sandbox
        places = (EndpointConfig(head=WEB, addresses=("10.0.1.6/24",)),)
        assert "1 packets received" in await run.output("ping", "-c", "1", "10.0.1.5", endpoints=places)
        await second.engine.remove(server.id, force=True)
        await eventually(lambda: not list(lab.paths.overlays.iterdir()), "the network is removed")
