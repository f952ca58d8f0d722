"""The other process of ``bench.thousands``: nodes that join, and reach the desired state of every task at once.

They have no containers.  A task runs as soon as it is assigned, and ends as soon as it should.  Like a real agent,
each node has one call with statuses at a time, and sends only the latest status of each task.
"""

import asyncio
import random
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress

from bench.simulated_agents import STATUS, Agent, Crowd, obey
from skep.agent.certificates import fetch_root
from skep.model.networks.data_planes import NODE_LABEL
from skep.model.node import EngineDescription, NodeDescription
from skep.model.service import Platform, Resources
from skep.model.task import TaskState, TaskStatus
from skep.security.identity import ROOT_NAME
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.tls import client_context, joining_context
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import ManagerChannel, open_channel

JOINING_AT_ONCE, OVER_ONE_CONNECTION = 3, 100
"""Limits for joining: connections at a time, and nodes over one connection.

A manager accepts four connections without a certificate from an address, for a minute each.
"""
RESPONSE_S = 60.0
RETURN_S = 1.0
"""Average seconds after which a node that lost its session tries again."""
ENDED = TaskStatus(state=TaskState.SHUTDOWN, message="shutdown")
STATUSES = {
    state: TaskStatus(state=state, message=state.value) for state in (TaskState.READY, TaskState.RUNNING)
}
"""Status of a task by its desired state, READY or RUNNING. Any other desired state ends it."""


async def run(count: int, address: str, token: str) -> None:
    """Join with ``count`` nodes, then run commands from standard input."""
    pairs = await join(count, address, token)
    await obey(Nodes(address, [client_context(pair) for pair in pairs]))


async def join(count: int, address: str, token: str) -> Sequence[KeyPair]:
    """Get certificates from the cluster.  A machine is known by its key, so several can use one connection."""
    root_pem = await fetch_root(address, token)
    waiting = list(range(count))
    pairs: list[KeyPair] = []

    async def ask() -> None:
        while waiting:
            async with open_channel(
                address, joining_context(root_pem), ROOT_NAME, timeout_s=RESPONSE_S
            ) as channel:
                for _ in waiting[:OVER_ONE_CONNECTION]:
                    if waiting:
                        waiting.pop()
                        pairs.append(await _join(channel, root_pem, token))

    await asyncio.gather(*[ask() for _ in range(JOINING_AT_ONCE)])
    return pairs


async def _join(channel: ManagerChannel, root_pem: bytes, token: str) -> KeyPair:
    key = new_private_key()
    request = pb.IssueNodeCertificateRequest(csr=signing_request(key), token=token)
    reply = await channel.call(methods.SKEP_ISSUE_NODE_CERTIFICATE, request, timeout_s=RESPONSE_S)
    status = await channel.call(
        methods.NODE_CERTIFICATE_STATUS,
        pb.NodeCertificateStatusRequest(node_id=reply.node_id),
        timeout_s=RESPONSE_S,
    )
    return KeyPair(
        certificate_pem=status.certificate.certificate, key_pem=private_pem(key), root_pem=root_pem
    )


class Nodes(Crowd):
    """All nodes."""

    def __init__(self, address: str, contexts: Sequence[ssl.SSLContext]) -> None:
        super().__init__(address, contexts)
        self.closed = 0
        """Sessions that the manager ended."""
        self._returning: set[asyncio.Task[None]] = set()

    def agent(self) -> Agent:
        return _Node(self)

    def lost(self, node: "_Node") -> None:
        """Let a node that lost its session return with its tasks.  Retry until it succeeds."""
        self.closed += 1
        if node in self.agents:  # otherwise it was lost as soon as it was registered
            self.agents.remove(node)
        returning = asyncio.create_task(self._return(node))
        self._returning.add(returning)
        returning.add_done_callback(self._returning.discard)

    async def _return(self, node: "_Node") -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * RETURN_S)
            with suppress(OSError, TimeoutError):
                return await self.connect(node.tls, lambda: _Node(self, node))

    async def obey(self, word: str) -> float | None:
        nodes = [agent for agent in self.agents if isinstance(agent, _Node)]
        match word:
            case "running":
                return sum(node.running for node in nodes)
            case "closed":
                return self.closed
            case "lose":
                lost = max(nodes, key=lambda node: node.running)
                self.agents.remove(lost)
                return lost.vanish()
            case _:
                return await super().obey(word)


class _Node(Agent):
    __slots__ = ("_answered", "_calls", "_is_gone", "_nodes", "_running", "_sent", "_states", "_unsent")

    description = NodeDescription(
        hostname="simulated",
        platform=Platform(architecture="x86_64", os="linux"),
        resources=Resources(nano_cpus=16_000_000_000, memory_bytes=64 << 30),
        engine=EngineDescription(engine_version="28.2.2", labels={NODE_LABEL: "true"}),
    )

    def __init__(self, nodes: Nodes, before: "_Node | None" = None) -> None:
        """``before`` is the same node in its last session."""
        super().__init__(nodes)
        self._nodes = nodes
        self._states: dict[str, TaskState] = before._states if before is not None else {}
        """The state of each assigned task."""
        self._unsent: dict[str, TaskStatus] = {
            id: STATUSES.get(state, ENDED) for id, state in self._states.items()
        }
        self._sent: dict[str, TaskStatus] = {}
        """Statuses in the call that has no response yet.  Empty without such a call."""
        self._calls = 0
        self._answered: set[int] = set()
        """Calls with statuses that have a response but have not ended yet."""
        self._is_gone = False
        self._running: set[str] = set()
        """Tasks that the manager knows as running, and whose desired state is running."""

    @property
    def running(self) -> int:
        """Return how many tasks run, as the manager knows."""
        return len(self._running)

    def take_assignments(self, message: pb.AssignmentsMessage) -> None:
        if message.type == pb.AssignmentsMessage.COMPLETE:
            reported = {change.assignment.task.id for change in message.changes}
            for id in self._states.keys() - reported:
                self._forget(id)
        for change in message.changes:
            if not change.assignment.HasField("task"):
                continue
            task = change.assignment.task
            if change.action == pb.AssignmentChange.REMOVE:
                self._forget(task.id)
                continue
            status = STATUSES.get(TaskState.from_number(task.desired_state), ENDED)
            before = self._states.get(task.id)
            if before is None or before < status.state:
                self._running.discard(task.id)
                self._states[task.id] = status.state
                self._unsent[task.id] = status
        self._send()

    def _forget(self, id: str) -> None:
        self._states.pop(id, None)
        self._unsent.pop(id, None)
        self._running.discard(id)

    def _send(self) -> None:
        if self._sent or not self._unsent or self._is_gone:
            return
        self._sent, self._unsent = self._unsent, {}
        self.send_statuses(STATUS + 2 * self._calls, self._sent)
        self._calls += 1

    def answered(self, stream_id: int) -> None:
        sent, self._sent = self._sent, {}
        self._running |= {
            id for id, status in sent.items() if status.state is TaskState.RUNNING is self._states.get(id)
        }
        self._send()

    def ended(self, stream_id: int) -> None:
        if stream_id >= STATUS and stream_id in self._answered:
            self._answered.discard(stream_id)
            self.answered(stream_id)
        else:
            self._transport.abort()  # as an agent does, which then begins another session

    def _hear(self, stream_id: int, message: bytes) -> None:
        if stream_id >= STATUS:
            self._answered.add(stream_id)
        else:
            super()._hear(stream_id, message)

    def vanish(self) -> int:
        """Stop responding permanently, like a machine without power.  Return how many tasks ran here."""
        self._is_gone = True
        self._transport.abort()
        return self.running

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.registered.done():
            super().connection_lost(exc)
        elif not self._is_gone:
            self._is_gone = True
            self._nodes.lost(self)


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
