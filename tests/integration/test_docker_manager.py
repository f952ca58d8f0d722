"""Our agent as a worker of a real Docker manager: the protocol as Docker itself speaks it."""

import os
from contextlib import AsyncExitStack
from random import Random

import pytest

from skep.agent.certificates import join, renew
from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.model.logs import LogLine
from skep.model.node import NodeRole
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from tests.support.machines.engine_rig import ADDRESS, IMAGE, an_engine, network_namespace
from tests.support.managers.wire_rig import FakeWorker, an_agent_of, until

pytestmark = [pytest.mark.slow, pytest.mark.needs("dockerd"), pytest.mark.timeout(180)]

MANAGER = f"{ADDRESS}:2377"


@pytest.fixture
def namespace():
    with network_namespace(f"skep-manager-{os.getpid()}"):
        yield


async def test_our_agent_works_for_a_docker_manager(namespace, tmp_path):
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(an_engine())
        await engine.docker("swarm", "init", "--advertise-addr", ADDRESS)
        token = await engine.docker("swarm", "join-token", "-q", "worker")
        pair = await join(MANAGER, token, SystemClock())
        assert pair.identity.role is NodeRole.WORKER
        pair = await renew(MANAGER, pair, SystemClock())

        worker = FakeWorker()
        agent = await stack.enter_async_context(
            an_agent_of([KnownManager(NodeId(""), MANAGER)], pair, tmp_path, worker, Random(1))
        )
        node = agent.node_id
        await engine.wait_for(lambda output: "Ready" in output, "node", "ls", "-f", f"id={node}")

        await engine.docker("secret", "create", "s1", str(write(tmp_path / "secret", "topsecret")))
        await engine.docker(
            *("service", "create", "-d", "--name", "web", "--no-resolve-image", "--secret", "s1"),
            *("--constraint", f"node.id=={node}", "--env", "A=1", IMAGE, "/bin/sleep", "9"),
        )
        await until(lambda: worker.tasks, within_s=20)
        (assigned,) = worker.tasks.values()
        assert assigned.service_name == "web"
        assert assigned.task.node_id == node
        assert assigned.task.spec.container_spec.env == ("A=1",)
        assert assigned.task.spec.container_spec.args == ("/bin/sleep", "9")
        secrets = [secret for change in worker.sets for secret in change.secrets]
        assert [(secret.name, secret.data) for secret in secrets] == [("s1", b"topsecret")]

        for state in (TaskState.ACCEPTED, TaskState.PREPARING, TaskState.STARTING, TaskState.RUNNING):
            worker.report(assigned.task.id, state)
        await engine.wait_for(lambda output: "Running" in output, "service", "ps", "web")

        worker.lines = [
            LogLine(
                task_id=assigned.task.id,
                service_id=assigned.task.service_id,
                node_id=node,
                data=b"hello\n",
                timestamp_ns=5,
            )
        ]
        await engine.wait_for(lambda output: "hello" in output, "service", "logs", "--raw", "web")

        await engine.docker("service", "rm", "web")
        await until(lambda: not worker.tasks or _is_stopping(worker), within_s=20)
        worker.report(assigned.task.id, TaskState.SHUTDOWN)
        await until(lambda: not worker.tasks, within_s=20)


def _is_stopping(worker: FakeWorker) -> bool:
    return all(task.task.desired_state > TaskState.RUNNING for task in worker.tasks.values())


def write(path, text: str):
    path.write_text(text)
    return path
