"""An unmodified Docker Engine as a worker: it joins, runs tasks, reports, answers for logs."""

import os
import secrets
from contextlib import aclosing

import msgspec
import pytest

from skep.manager.gossip.keys import rotated
from skep.model.container import ConfigReference, ContainerSpec, FileTarget, SecretReference
from skep.model.logs import LogQuery
from skep.model.networks.gossip import GossipKeys, decoded_keys
from skep.model.node import Node, NodeState
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import EndpointSpec, PortConfig, PublishMode, TaskSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import ConfigId, NodeId, SecretId, new_id
from skep.model.values.times import timestamp
from skep.store.interface import Transaction
from skep.store.kinds import GOSSIP_KEYS_ID, Payload
from tests.support.builders import a_service, a_service_spec, a_task
from tests.support.machines.engine_rig import ADDRESS, IMAGE, Engine, an_engine, network_namespace
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.needs("dockerd"), pytest.mark.timeout(240)]

LOOP = ("/bin/sh", "-c", "trap 'exit 0' TERM; while :; do echo tick; sleep 1; done")


@pytest.fixture
def namespace():
    with network_namespace(f"skep-engine-{os.getpid()}"):
        yield


async def run_task(
    cluster: Cluster, node: NodeId, container: ContainerSpec, ports: tuple[PortConfig, ...] = ()
) -> Task:
    """Assign a task of a new service to the node, as scheduler and orchestrator would."""
    spec = msgspec.structs.replace(
        a_service_spec(f"web{new_id()[:6]}"),
        task_template=TaskSpec(container_spec=container),
        endpoint_spec=EndpointSpec(ports=ports),
    )
    service = a_service(spec.name, id=new_id(), spec=spec)
    task = a_task(new_id(), node=node, service=service, state=TaskState.ASSIGNED)
    await cluster.store.update(lambda tx: (tx.put(service), tx.put(task)))
    return task


def status_of(cluster: Cluster, task: Task):
    return cluster.view.get(Task, task.id).status


async def reaches(cluster: Cluster, task: Task, state: TaskState) -> None:
    await until(lambda: status_of(cluster, task).state is state, within_s=30)


async def requested(cluster: Cluster, task: Task, desired: TaskState) -> None:
    await cluster.store.update(
        lambda tx: tx.put(msgspec.structs.replace(tx.get(Task, task.id), desired_state=desired))
    )


async def refused(engine: Engine, token: str) -> str:
    """What `docker swarm join` says."""
    join = ("swarm", "join", "--token", token, f"{ADDRESS}:2377")
    return await engine.docker(*join, check=False, timeout_s=60)


async def joined(cluster: Cluster, engine: Engine) -> NodeId:
    """The engine's node id, after `docker swarm join`."""
    token = cluster.swarm.join_tokens.worker
    await engine.docker("swarm", "join", "--token", token, cluster.address)
    (node,) = [node for node in cluster.view.find(Node) if node.id != MANAGER_ID]
    await until(lambda: node.id in cluster.logs.listeners)
    return node.id


async def rotates_its_gossip_keys(cluster: Cluster, engine: Engine) -> None:
    """Three rotations replace every key; after each the engine encrypts with the second of its keys."""
    for _ in range(3):
        keys = await cluster.store.update(rotate)
        _, primary, newest = (key.key.hex()[:5] for key in keys.keys if key.subsystem == "networking:gossip")
        await until(lambda: f"Adding key {newest}" in engine.log(), within_s=10)  # noqa: B023
        await until(lambda: f"Primary Key {primary}" in engine.log(), within_s=10)  # noqa: B023


def rotate(tx: Transaction) -> GossipKeys:
    keys = rotated(decoded_keys(tx.get(Payload, GOSSIP_KEYS_ID).data), secrets.token_bytes, timestamp(0))
    tx.put(Payload(id=GOSSIP_KEYS_ID, data=keys.encode()))
    return keys


async def test_an_unmodified_engine_works_as_a_node(namespace):
    cluster = Cluster(heartbeat_s=1, host=ADDRESS)
    async with an_engine() as engine:
        async with cluster.serving(2377):
            wrong = cluster.swarm.join_tokens.worker[:-3] + "000"
            assert "A valid join token is necessary to join this cluster" in await refused(engine, wrong)
            manager = cluster.swarm.join_tokens.manager
            assert "takes Docker engines as workers only" in await refused(engine, manager)

            node_id = await joined(cluster, engine)
            node = cluster.node(node_id)
            assert node.status.state is NodeState.READY
            assert node.status.addr == ADDRESS
            assert node.description.engine.engine_version
            assert node.description.platform.os == "linux"

            secret = Secret(id=SecretId(new_id()), spec=SecretSpec(name="s1"))
            config = Config(id=ConfigId(new_id()), spec=ConfigSpec(name="c1", data=b"plain"))
            payload = Payload(id=f"secret/{secret.id}", data=b"topsecret")
            await cluster.store.update(lambda tx: (tx.put(secret), tx.put(config), tx.put(payload)))
            file = FileTarget(name="s1", uid="0", gid="0", mode=0o444)
            container = ContainerSpec(
                image=IMAGE,
                command=LOOP,
                secrets=(SecretReference(file=file, secret_id=secret.id, secret_name="s1"),),
                configs=(
                    ConfigReference(
                        file=msgspec.structs.replace(file, name="/c1"),
                        config_id=config.id,
                        config_name="c1",
                    ),
                ),
            )
            port = PortConfig(target_port=80, published_port=8081, publish_mode=PublishMode.HOST)
            web = await run_task(cluster, node_id, container, (port,))
            await reaches(cluster, web, TaskState.RUNNING)
            assert status_of(cluster, web).port_status.ports[0].published_port == 8081
            (container_id,) = (await engine.docker("ps", "-q", "--no-trunc")).split()
            assert status_of(cluster, web).container_status.container_id == container_id
            shown = await engine.docker("exec", container_id, "/bin/cat", "/run/secrets/s1", "/c1")
            assert shown == "topsecretplain"

            failing = await run_task(
                cluster, node_id, ContainerSpec(image=IMAGE, command=("/bin/sh", "-c", "exit 7"))
            )
            await reaches(cluster, failing, TaskState.FAILED)
            assert status_of(cluster, failing).container_status.exit_code == 7
            absent = await run_task(cluster, node_id, ContainerSpec(image="nosuch:1"))
            await reaches(cluster, absent, TaskState.REJECTED)

            async with aclosing(cluster.logs.subscribe(LogQuery(tasks=(web.id,), follow=True))) as lines:
                assert (await anext(lines)).data == b"tick\n"
                assert (await anext(lines)).node_id == node_id
            tail = [line.data async for line in cluster.logs.subscribe(LogQuery(tasks=(web.id,), tail=1))]
            assert tail == [b"tick\n"]
            await rotates_its_gossip_keys(cluster, engine)
            session = cluster.node(node_id).session

        # Another manager process on the same store: the engine moves on by itself, its containers run on.
        async with cluster.serving(2377):
            await until(lambda: cluster.node(node_id).session != session, within_s=30)
            await until(lambda: node_id in cluster.logs.listeners, within_s=30)
            assert cluster.node(node_id).status.state is NodeState.READY
            assert (await engine.docker("ps", "-q", "--no-trunc")) == container_id

            # An engine that restarts has lost its tasks: what ended stays ended, what ran has failed.
            await engine.stop()
            await cluster.until(lambda view: view.get(Node, node_id).status.state is NodeState.DOWN, 30)
            await engine.start()
            await reaches(cluster, web, TaskState.FAILED)
            assert status_of(cluster, failing).container_status.exit_code == 7
            assert cluster.node(node_id).status.state is NodeState.READY

            again = await run_task(cluster, node_id, ContainerSpec(image=IMAGE, command=LOOP))
            await reaches(cluster, again, TaskState.RUNNING)
            await requested(cluster, again, TaskState.SHUTDOWN)
            await reaches(cluster, again, TaskState.SHUTDOWN)
            tasks = (web, failing, absent, again)
            await cluster.store.update(lambda tx: [tx.delete(Task, task.id) for task in tasks])
            await engine.wait_for(lambda output: not output, "ps", "-aq")
            await engine.docker("swarm", "leave")
