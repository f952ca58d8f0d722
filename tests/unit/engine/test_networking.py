"""What the engine gives to the data plane."""

from pathlib import Path

from msgspec.structs import replace

from skep.engine.containers.container import PlainOptions
from skep.engine.networks.networking import sandbox_config
from skep.model.networks.sandbox import EndpointRequest, NetworkMode
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.values.ids import ContainerId
from tests.support.engine.oci_rig import Machine, memory_engine, new_container
from tests.unit.dataplane.test_container_network import on_the_ingress_network
from tests.unit.engine.test_records import a_container


async def test_names_are_checked_in_the_sandboxes_of_running_containers_alone(tmp_path: Path) -> None:
    machine = Machine()
    engine = memory_engine(tmp_path, machine)
    async with engine.running():
        runs, ends, _created = [await engine.add(new_container(name)) for name in ("a", "b", "c")]
        for one in (runs, ends):
            await engine.start(one.id)
        assert len(list(engine.running_sandboxes())) == 2
        machine.end(ends.id)
        await engine.wait(ends.id)
        assert list(engine.running_sandboxes()) == [engine.get(runs.id).sandbox]
        machine.end(runs.id)
        await engine.wait(runs.id)


def test_a_task_without_networks_is_on_the_gateway_bridge() -> None:
    task = replace(a_container(name="web.1"), labels={LABEL_TASK_ID: "t1"}, plain=None)
    alone = sandbox_config(replace(task, config=replace(task.config, endpoints=())))
    assert (alone.task, alone.mode, alone.endpoints) == ("t1", NetworkMode.BRIDGE, ())
    _, sandbox = on_the_ingress_network(1)
    endpoints = tuple(one.config for one in sandbox.endpoints)
    connected = sandbox_config(replace(task, config=replace(task.config, endpoints=endpoints)))
    assert (connected.mode, connected.endpoints) == (NetworkMode.NETWORKS, endpoints)


def test_a_plain_container_is_on_the_networks_that_its_user_names() -> None:
    requests = (EndpointRequest(network="net1"),)
    plain = PlainOptions(mode=NetworkMode.NETWORKS, networks=requests)
    box = replace(a_container(name="box"), id=ContainerId("b" * 64), labels={}, plain=plain)
    config = sandbox_config(box)
    assert (config.id, config.name, config.task) == (box.id, "box", "")
    assert (config.mode, config.networks) == (NetworkMode.NETWORKS, requests)
