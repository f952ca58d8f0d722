"""A node whose own manager is only starting: it has its session as soon as that one serves."""

import asyncio
from random import Random

from skep.agent.agent import LONGEST_RETRY_S, Agent
from skep.agent.renewal import KeyPairCredentials
from skep.agent.session.managers import KnownManager, ManagerList
from skep.agent.session.revisions import SeenRevision
from skep.agent.session.session import NodeServices
from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, FakeWorker, a_worker, describe


class StandingClock(SystemClock):
    """A clock whose waits never end.  ``tired`` is set when a wait for the next attempt begins."""

    def __init__(self) -> None:
        self.tired = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        if seconds <= LONGEST_RETRY_S:
            self.tired.set()
        await asyncio.Event().wait()


async def test_a_new_manager_list_ends_the_backoff_of_an_agent(tmp_path):
    cluster = Cluster()
    async with cluster.serving():
        pair = await a_worker(cluster, tmp_path)
    clock, worker = StandingClock(), FakeWorker()
    agent = Agent(
        credentials=KeyPairCredentials(tmp_path, clock, Random(1)),
        managers=ManagerList([KnownManager(MANAGER_ID, cluster.address)]),
        describe=describe,
        services=NodeServices(
            sink=worker,
            reports=worker.reports,
            logs=worker,
            seen=SeenRevision(None, pair.identity.cluster_id),
        ),
        clock=clock,
        random=Random(1),
        session_state=SessionState(clock),
    )
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(agent.run())
        await clock.tired.wait()
        assert not agent.registered.is_set()
        async with cluster.serving(cluster.port):
            agent.try_now()
            await agent.registered.wait()
            running.cancel()
            await asyncio.wait([running])
    assert agent.node_id == pair.identity.node_id
