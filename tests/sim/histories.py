"""Histories for the rules of the simulation: commits as the store would make them."""

from collections.abc import Callable, Iterable

import msgspec

from sim.invariants.observer import Rule
from sim.world.committed import Change
from skep.model.network import Network
from skep.model.node import Node, NodeDescription, NodeState, NodeStatus, SessionOwner
from skep.model.service import (
    Resources,
    RestartPolicy,
    Service,
    UpdateConfig,
    UpdateOrder,
)
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS
from skep.store.interface import Transaction
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.transactions.proposal import Proposal
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_service_spec

LEADER, OTHER = NodeId("m1"), NodeId("m2")
W1, W2, W3 = NodeId("w1"), NodeId("w2"), NodeId("w3")


class History:
    """Commits one after the other, as the store would make them, without asking whether they may be made."""

    def __init__(self, *rules: Rule) -> None:
        self.state = State()
        self.violations: list[str] = []
        self.now = 100.0
        self._rules = rules

    def commit(self, body: Callable[[Transaction], object], *, by: NodeId = LEADER) -> None:
        tx = LocalTransaction(self.state, 0)
        body(tx)
        self._publish(tx.proposal(), by)

    def put(self, *objects: Task | Service | Node | Network, by: NodeId = LEADER) -> None:
        for one in objects:
            self.commit(lambda tx, one=one: tx.put(one), by=by)  # type: ignore[misc]

    def after(self, seconds: float) -> "History":
        self.now += seconds
        return self

    def note(self, violations: Iterable[str]) -> None:
        self.violations += violations

    def _publish(self, proposal: Proposal, by: NodeId) -> None:
        revision = self.state.revision + 1
        created = {key for key, _ in proposal.puts}
        keys = tuple(
            [KeyChange(key, None, revision) for key in proposal.deletes]
            + [KeyChange(key, value, revision, revision) for key, value in proposal.puts if key in created]
        )
        events = self.state.apply(revision, keys)
        change = Change(self.now, by, LEADER, 1, revision, keys, events)
        for rule in self._rules:
            self.violations += rule(change, self.state)


def a_node(
    id: NodeId, *, state: NodeState = NodeState.READY, owner: NodeId = LEADER, session: str = "s1"
) -> Node:
    return Node(
        id=id,
        status=NodeStatus(state=state),
        description=NodeDescription(hostname=id, resources=Resources(memory_bytes=1 << 30)),
        session=SessionOwner(manager_id=owner, session_id=session),  # type: ignore[arg-type]
    )


def a_task(
    id: str,
    *,
    slot: int = 1,
    node: str = "",
    state: TaskState = TaskState.NEW,
    desired: TaskState = TaskState.RUNNING,
    delay_s: int = 0,
    memory: int = 0,
    image: str = "app:1",
) -> Task:
    spec = a_service_spec(
        image=image,
        restart=RestartPolicy(delay=delay_s * SECOND_NS),
        reserve=Resources(memory_bytes=memory) if memory else None,
    ).task_template
    return Task(
        id=TaskId(id),
        service_id=ServiceId("web"),
        slot=slot,
        node_id=NodeId(node),
        spec=spec,
        status=TaskStatus(state=state),
        desired_state=desired,
    )


def a_service(order: UpdateOrder = UpdateOrder.STOP_FIRST, *, id: str = "web", name: str = "web") -> Service:
    config = UpdateConfig(order=order)
    return Service(id=ServiceId(id), spec=a_service_spec(name, update=config, rollback=config))


def a_run(id: str, *, slot: int = 1, iteration: int = 1, **fields: object) -> Task:
    """A task of a job."""
    task = a_task(id, slot=slot, desired=TaskState.COMPLETE)
    return msgspec.structs.replace(task, job_iteration=Version(index=iteration), **fields)
