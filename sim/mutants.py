"""Mutation tests of the simulation, which break named rules of the product, one at a time.

Each mutant replaces production functions at run time.  Seeds are simulated until one has a violation, which kills the
mutant.  A mutant that survives all seeds shows that the workload, the faults or the invariants of the simulation are
too weak.

``python -m sim.mutants`` prints the table.  ``python -m sim.mutants fence "full disks"`` judges only these mutants.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import msgspec
from msgspec.structs import replace

from sim import differential, focused, run, visits
from sim.crossings import CROSSINGS
from sim.etcd.client import SimulatedClient
from sim.seeds import Simulate, results
from sim.store_only import run as store_only
from skep.agent.session import revisions
from skep.agent.session.reports import Reports
from skep.agent.tasks import worker
from skep.agent.tasks.worker import Worker
from skep.aio.clock import SystemClock
from skep.aio.time_slices import SlicedWork
from skep.api.client.requests import Requests
from skep.cli.cluster import node as node_commands
from skep.cli.maintain import maintenance, upgrade, upgrade_plan
from skep.cli.stack import stack_stops
from skep.errors import PermissionDenied, SkepError
from skep.manager.allocator.allocations import Allocations
from skep.manager.autoscaling import decision
from skep.manager.autoscaling import state as autoscaling_state
from skep.manager.ca import loop as ca_loop
from skep.manager.ca.rotation import next_step
from skep.manager.control import files, quotas, services, tasks
from skep.manager.dispatcher import statuses
from skep.manager.dispatcher.node_sessions import adoption, heartbeat_deadlines
from skep.manager.dispatcher.node_sessions.registration import SessionInvalid
from skep.manager.notify import messages, outbox
from skep.manager.notify.records import Delivery
from skep.manager.orchestrator import (
    changes,
    convergence,
    decision_inputs,
    global_services,
    jobs,
    observed_times,
    replicated,
    update,
)
from skep.manager.orchestrator import state as orchestrator_state
from skep.manager.orchestrator.changes import FillSlot
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.due_slots import SlotKey
from skep.manager.orchestrator.reaper import lost_nodes, node_loop
from skep.manager.orchestrator.reaper import state as reaper_state
from skep.manager.orchestrator.replacement import allowance, held_places, restart
from skep.manager.orchestrator.slots import Slot, age
from skep.manager.scheduler import dependencies as scheduler_dependencies
from skep.manager.scheduler.explaining import dry_run
from skep.manager.scheduler.group_queue import GroupQueue
from skep.manager.scheduler.nodes import filters, requirements, spread
from skep.manager.scheduler.nodes import volumes as scheduler_volumes
from skep.manager.scheduler.nodes.accounting import Account
from skep.manager.scheduler.preemption import preemptor
from skep.manager.scheduler.preemption.preemption import Occupants
from skep.manager.scheduler.preemption.preemptor import Preemptor
from skep.manager.scheduler.preemption.priorities import Priorities
from skep.manager.scheduler.returning import Returning
from skep.manager.schedules import due
from skep.manager.services import spec_history
from skep.manager.services.job_runs import of_present_run
from skep.manager.services.quotas import quota_of
from skep.manager.services.resources import GenericStock
from skep.model import needs
from skep.model.assignment import AssignmentSet
from skep.model.network import Network
from skep.model.node import Node, NodeState
from skep.model.options import constraints
from skep.model.options.autoscaling import Autoscaling
from skep.model.options.labels import DisconnectPolicy, job_ttl_s
from skep.model.service import ReplicatedJob, Service, ServiceSpec
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskStatus
from skep.model.values.ids import IdSource, NetworkId, NodeId, ServiceId, SessionId, TaskId
from skep.model.values.stacks import STACK_LABEL
from skep.stack import deploying, removing
from skep.stack.deploying import Deployment
from skep.store.etcd import batcher, election, store
from skep.store.etcd.reflector import Reflector
from skep.store.interface import Event, Transaction, View
from skep.store.leadership import LeaderRecord
from skep.store.state import Owner, State
from skep.store.transactions import transaction
from skep.store.transactions.proposal import Committed, Compare, Exists, Footprint, NothingSince
from skep.store.transactions.transaction import ProposalBuilder
from skep.store.transactions.updates import Updater

SEEDS = 200
CROSSING_SEEDS = 3
"""Number of seeds for mutants that a run of ``crossings`` finds."""
STORE_SEEDS = 400
"""Number of seeds for mutants of the store.  A run of only the store costs a twentieth of a whole run."""


class Patch(msgspec.Struct, frozen=True):
    """Replaces ``owner.name`` by ``value``."""

    owner: Any
    name: str
    value: Any


class Mutant(msgspec.Struct, frozen=True):
    """One broken rule."""

    name: str
    rule: str
    """The broken rule of the product."""
    patches: Callable[[], list[Patch]]
    simulate: Simulate = run.simulate
    seeds: int = SEEDS
    """Number of seeds within which it must be killed."""


class Verdict(msgspec.Struct, frozen=True):
    """The seed that killed a mutant.  ``seed``: None if the mutant survived all seeds."""

    mutant: str
    seed: int | None
    runs: int
    seconds: float
    violation: str = ""


def judge(mutant: Mutant, seeds: int | None = None) -> Verdict:
    """Simulate seeds with the rule broken until one has a violation.  ``seeds`` defaults to the mutant's own number."""
    clock = SystemClock()
    began = clock.monotonic()
    seeds = mutant.seeds if seeds is None else seeds
    with broken(mutant):
        for runs, result in enumerate(results(range(seeds), mutant.simulate), 1):
            if result.violations:
                took_s = clock.monotonic() - began
                return Verdict(mutant.name, result.seed, runs, took_s, result.violations[0])
    return Verdict(mutant.name, None, seeds, clock.monotonic() - began)


@contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """Run the block with the rule broken."""
    with ExitStack() as patches:
        for patch in mutant.patches():
            patches.enter_context(mock.patch.object(patch.owner, patch.name, patch.value))
        yield


# -- the mutants -----------------------------------------------------------------------------------------------------


def _unfenced() -> list[Patch]:
    real = batcher.QueuedProposal
    return [Patch(batcher, "QueuedProposal", lambda proposal, fence: real(proposal, None))]


def _any_session() -> list[Patch]:
    def careless(tx: Transaction, node_id: NodeId, session_id: SessionId) -> Node:
        node = tx.lookup(Node, node_id)  # unlike `get`, which would compare the whole node at the commit
        if node is None:
            raise SessionInvalid
        return node

    return [Patch(statuses, "require_session", careless)]


def _any_state() -> list[Patch]:
    def latest(stored: TaskStatus, reported: TaskStatus) -> TaskStatus | None:
        return reported if reported != stored else None

    return [Patch(statuses, "newer_status", latest)]


def _packed() -> list[Patch]:
    def fullest(self: spread.Spread) -> SlicedWork[Account | None]:
        yield
        accounts = self._accounting.accounts
        able = [accounts[id] for id, passes in self.candidates.can_pass.items() if passes and id in accounts]
        with_room = [account for account in able if self.has_capacity(account)]
        return max(with_room, key=self.copies, default=None)

    return [Patch(spread.Spread, "choosing", fullest)]


def _other_order() -> list[Patch]:
    real = update._Rollout.__init__

    def turned(self: update._Rollout, *args: Any) -> None:
        real(self, *args)
        self._starts_first = not self._starts_first

    return [Patch(update._Rollout, "__init__", turned)]


def _impatient() -> list[Patch]:
    return [Patch(heartbeat_deadlines, "grace_period", lambda period_s, **_: 0.8 * period_s)]


def _no_claims() -> list[Patch]:
    return [Patch(transaction.LocalTransaction, "_claim", lambda *_: None)]


def _any_revision() -> list[Patch]:
    return [Patch(revisions, "advanced", lambda seen, offered: offered)]


def _no_delay() -> list[Patch]:
    return [Patch(restart, "delay_s", lambda task: 0.0)]


def _stale_reads() -> list[Patch]:
    async def at_once(self: store.EtcdStore) -> None:
        return None

    return [Patch(store.EtcdStore, "barrier", at_once)]


def _sent_again() -> list[Patch]:
    async def settle(self: batcher.Batcher, batch: batcher.Batch) -> None:
        self._requeue(batch.proposals)

    return [Patch(batcher.Batcher, "_settle", settle)]


def _crowded_slots() -> list[Patch]:
    return [Patch(restart, "_still_stopping", lambda slot, situation: [])]


def _all_runs_at_once() -> list[Patch]:
    real = jobs._missing_runs

    def unbounded(
        service: Service, job: ReplicatedJob, slots: Mapping[int, Slot], situation: Situation
    ) -> list[FillSlot]:
        return real(service, replace(job, max_concurrent=job.total_completions), slots, situation)

    return [Patch(jobs, "_missing_runs", unbounded)]


def _last_word_stands() -> list[Patch]:
    return [Patch(tasks, "known_status", lambda view, task: task.status)]


def _no_adoption() -> list[Patch]:
    return [Patch(adoption, "orphans", lambda *_: [])]


def _no_patience() -> list[Patch]:
    def impatient(period_s: float, **_: object) -> float:
        return 0.8 * period_s

    return [
        Patch(heartbeat_deadlines, name, impatient)
        for name in ("grace_after_absence", "grace_after_adoption")
    ]


def _crowding_out() -> list[Patch]:
    def all_but_the_oldest(node: Node, tasks: Iterable[Task]) -> frozenset[TaskId]:
        held = sorted((task for task in tasks if task.is_active), key=age)
        return frozenset(task.id for task in held[1:])

    return [Patch(orchestrator_state, "overcommitted", all_but_the_oldest)]


def _one_too_many() -> list[Patch]:
    return [Patch(restart, "_is_superseded", lambda task, current, situation: False)]


def _keepsakes() -> list[Patch]:
    real = Worker.assign

    async def assign(self: Worker, change: AssignmentSet) -> None:
        await real(self, replace(change, complete=False))

    return [Patch(Worker, "assign", assign)]


def _any_version() -> list[Patch]:
    real = services._changeable

    def careless(tx: Transaction, id: ServiceId, spec: ServiceSpec, version: int) -> Service:
        present = tx.lookup(Service, id)
        return real(tx, id, spec, present.version.index if present is not None else version)

    return [Patch(services, "_changeable", careless)]


def _shared_ports() -> list[Patch]:
    return [Patch(requirements, "host_ports", lambda spec: ())]


def _anywhere() -> list[Patch]:
    return [Patch(requirements, "parsed", lambda constraints: ())]


def _always_replaced() -> list[Patch]:
    users = (decision_inputs, orchestrator_state)  # the second one tests what the first one has decided
    return [Patch(module, "policy_on", lambda node, service: DisconnectPolicy()) for module in users]


def _never_stopped() -> list[Patch]:
    real = worker.stop_reason
    return [Patch(worker, "stop_reason", lambda assigned, _, removal=None: real(assigned, 0.0, removal))]


def _again_and_again() -> list[Patch]:
    return [Patch(jobs, "is_done", lambda slot: False)]


def _adopts_whatever_is_there() -> list[Patch]:
    def careless(
        tx: Transaction, orphan: adoption.OrphanedNode, own: NodeId, new_id: IdSource, now_ns: int
    ) -> bool:
        node = tx.lookup(Node, orphan.node_id)
        if node is None:
            return False
        session = replace(orphan.session, manager_id=own, session_id=SessionId(new_id()))
        tx.put(replace(node, session=session))
        return True

    return [Patch(adoption, "adopt", careless)]


def _reports_once() -> list[Patch]:
    return [Patch(Reports, "put_back", lambda self, batch: None)]


def _suspects_all() -> list[Patch]:
    return [Patch(update._Rollout, "_has_failed", lambda self, lead: True)]


def _gives_back_early() -> list[Patch]:
    real = Allocations.enter_task

    def enter_task(self: Allocations, task: Task) -> frozenset[NetworkId]:
        return real(self, task) if task.is_wanted else self.leave_task(task.id)

    return [Patch(Allocations, "enter_task", enter_task)]


def _gives_back_never() -> list[Patch]:
    return [Patch(Allocations, "leave_task", lambda self, task_id: frozenset())]


def _keeps_removed_networks() -> list[Patch]:
    return [Patch(Allocations, "_forget_gone", lambda self, ids: None)]


def _forgets_removed_networks() -> list[Patch]:
    def leave_network(self: Allocations, network: Network) -> None:
        self.networks.leave(network.id)

    return [Patch(Allocations, "leave_network", leave_network)]


def _shared_devices() -> list[Patch]:
    return [Patch(GenericStock, "take", lambda *_: None)]


def _reserves_nothing() -> list[Patch]:
    return [Patch(needs, "system_reserve", lambda _: (0, 0))]


def _compares_texts() -> list[Patch]:
    def first(text: str) -> tuple[int, ...] | None:
        found = real(text)
        return found and found[:1]

    real = constraints._number
    return [Patch(constraints, "_number", first)]


def _keeps_no_specs() -> list[Patch]:
    return [Patch(services, "keep_spec", lambda tx, service, spec, author: author)]


def _numbers_again() -> list[Patch]:
    real = spec_history._encoded
    return [Patch(spec_history, "_encoded", lambda last, found: real(len(found) - 1, found))]


def _reboots_at_once() -> list[Patch]:
    async def drain(client: Requests, name: str, within_s: float, *, now: bool = False) -> None:
        await node_commands._set_draining(client, name, now=now)

    return [Patch(upgrade, "drain_and_wait", drain)]


def _stops_nothing() -> list[Patch]:
    async def skip(*_: object, **__: object) -> None:
        return None

    return [Patch(stack_stops, "turn", skip)]


def _another_message() -> list[Patch]:
    real = messages.message_of

    def message_of(delivery: Delivery, cluster: str, cluster_id: str) -> messages.Message:
        found = real(delivery, cluster, cluster_id)
        return replace(found, id=f"{found.id}-{delivery.attempts}")

    return [Patch(outbox, "message_of", message_of)]


# -- rules of features that Docker does not have --------------------------------------------------------------------


def _counts_moves() -> list[Patch]:
    real = restart.should_restart

    def counting(task: Task, slot: Slot, seen: observed_times.ObservedTimes, most: int = 0) -> bool:
        policy = task.spec.restart_policy
        made = [one for one in slot if one.spec_version == task.spec_version]
        is_over = policy is not None and policy.max_attempts and len(made) > policy.max_attempts
        return real(task, slot, seen, most) and not is_over

    users = (restart, replicated, global_services, jobs)
    return [Patch(module, "should_restart", counting) for module in users]


def _has_no_budget() -> list[Patch]:
    return [Patch(convergence, "within_budget", lambda steps, _: allowance.Allowed(list(steps)))]


def _has_no_budget_for_labels() -> list[Patch]:
    return [*_has_no_budget(), Patch(decision_inputs, "required", lambda _: None)]


def _moves_during_freezes() -> list[Patch]:
    return [
        Patch(orchestrator_state, "held_by", lambda *_: ""),
        Patch(changes, "is_held_at_commit", lambda *_: False),
    ]


def _may_not_shrink() -> list[Patch]:
    real = quotas.check_quota

    def check_quota(tx: Transaction, spec: ServiceSpec, present: Service | None = None) -> None:
        stack = spec.labels.get(STACK_LABEL, "")
        if present is not None and spec.replicas < present.spec.replicas and quota_of(tx, stack):
            raise PermissionDenied("broken: a quota refuses a smaller number of tasks")
        real(tx, spec, present)

    return [Patch(services, "check_quota", check_quota)]


def _gives_nothing_up() -> list[Patch]:
    return [Patch(update, "blocks", lambda *_: False), Patch(held_places, "blocks", lambda *_: False)]


def _keeps_no_nodes() -> list[Patch]:
    real = lost_nodes.removable

    def removable(nodes: Iterable[Node], **rest: Any) -> list[NodeId]:
        return real(nodes, **{**rest, "is_kept": lambda _: False})

    def remove(tx: Transaction, id: NodeId, *_: object) -> bool:
        node = tx.rely_on(Node, id)
        if node is None or not lost_nodes.is_lost_worker(node):
            return False
        tx.delete(Node, id)
        return True

    return [Patch(node_loop, "removable", removable), Patch(node_loop, "remove_lost", remove)]


def _removes_used_secrets() -> list[Patch]:
    real = transaction.LocalTransaction._users

    def users(self: transaction.LocalTransaction, used: Owner) -> list[Owner]:
        return [] if used[0] == "secret" else real(self, used)

    return [Patch(transaction.LocalTransaction, "_users", users)]


def _removes_secrets_of_runs() -> list[Patch]:
    return [Patch(files, "runs_with", lambda *_: [])]


def _never_given_up() -> list[Patch]:
    return [Patch(jobs, "_is_given_up", lambda slot, situation: False)]


def _ignores_disks() -> list[Patch]:
    return [Patch(filters, "DISK_PRESSURE_LABEL", "")]


def _tries_runs_without_end() -> list[Patch]:
    return [Patch(decision_inputs, "max_attempts_of", lambda labels: 0)]


def _waits_for_nothing() -> list[Patch]:
    return [Patch(scheduler_dependencies, "awaited", lambda *_: None)]


def _passes_over_silently() -> list[Patch]:
    return [Patch(due, "_skipped", lambda job, status, start, reason: replace(job, schedule=status))]


def _keeps_spec_versions() -> list[Patch]:
    return [Patch(reaper_state, "unused_versions", lambda *_: [])]


def _accepts_all() -> list[Patch]:
    real = dry_run.DryRun.placing

    def placing(self: dry_run.DryRun, specs: ServiceSpec) -> Iterator[dry_run.PlannedPlacement | None]:
        for step in real(self, specs):
            yield replace(step, error="") if step is not None else None

    return [Patch(dry_run.DryRun, "placing", placing)]


def _decides_all_for_a_node() -> list[Patch]:
    def all_slots(
        self: orchestrator_state.OrchestratorState, node: Node
    ) -> Iterator[tuple[ServiceId, SlotKey | None]]:
        for service in self._view().find(Service):
            yield service.id, None

    return [Patch(orchestrator_state.OrchestratorState, "_slots_of_node", all_slots)]


def _deletes_unreported_tasks() -> list[Patch]:
    return [Patch(reaper_state, "unreported", lambda *_: {})]


def _shares_the_lock() -> list[Patch]:
    def taken(
        holders: Sequence[maintenance.LockHolder], holder: maintenance.LockHolder, *_: object, **__: object
    ) -> tuple[maintenance.LockHolder, ...]:
        return *(one for one in holders if not maintenance.is_same(one, holder)), holder

    return [Patch(maintenance, "taken", taken)]


def _leaves_changes_to_others() -> list[Patch]:
    async def services_as_wanted(self: Deployment) -> None:
        try:
            await self._change_services()
        except SkepError:
            if self._created.claim is None or not await self._created.claim.follow():
                raise

    return [Patch(Deployment, "_services_as_wanted", services_as_wanted)]


def _overlooks_rollbacks() -> list[Patch]:
    return [Patch(deploying, "is_rolled_back", lambda *_: False)]


def _keeps_configs() -> list[Patch]:
    real = removing._remove

    async def remove(client: Any, kind: str, *rest: Any) -> None:
        if kind != "config":
            await real(client, kind, *rest)

    return [Patch(removing, "_remove", remove)]


def _leaves_workers_out() -> list[Patch]:
    real = upgrade_plan.plan

    def plan(*args: Any, **options: Any) -> upgrade_plan.UpgradePlan:
        found = real(*args, **options)
        return replace(found, steps=() if len(found.done) else found.steps, refusals=())

    return [Patch(upgrade, "plan", plan)]


def _allows_start_first_with_volumes() -> list[Patch]:
    return [Patch(services, "_check_volumes", lambda *_: None)]


def _removes_required_jobs() -> list[Patch]:
    return [Patch(changes, "requiring", lambda tx, name: [])]


def _keeps_tasks_of_gone_nodes() -> list[Patch]:
    return [Patch(reaper_state, "is_of_gone_slot", lambda task, node: False)]


def _decides_due_times_again() -> list[Patch]:
    return [Patch(due, "_settled", lambda status, start: status)]


def _allows_any_use() -> list[Patch]:
    return [Patch(services, "check_quota", lambda *_: None)]


def _refuses_forever() -> list[Patch]:
    return [Patch(GroupQueue, "retry", lambda self, *_: None)]


def _keeps_all_history() -> list[Patch]:
    return [Patch(reaper_state, "surplus_history", lambda *_: [])]


def _any_number_per_node() -> list[Patch]:
    real = requirements.requirements_of

    def requirements_of(*args: Any, **options: Any) -> requirements.Requirements:
        return replace(real(*args, **options), max_replicas=0)

    return [Patch(requirements, "requirements_of", requirements_of)]


def _preempts_equals() -> list[Patch]:
    def occupants(view: Callable[[], View], priorities: Priorities, below: int) -> Occupants:
        return Occupants(view, priorities, below + 1)

    return [Patch(preemptor, "Occupants", occupants)]


def _preempts_unasked() -> list[Patch]:
    return [Patch(preemptor, "allows_preemption", lambda labels: True)]


def _preempts_nothing() -> list[Patch]:
    return [Patch(Preemptor, "may_preempt", lambda self, task: False)]


def _rotates_without_absent_nodes() -> list[Patch]:
    def without_absent(swarm: Swarm, nodes: Iterable[Node], *rest: Any) -> Any:
        return next_step(swarm, [node for node in nodes if node.status.state is NodeState.READY], *rest)

    return [Patch(ca_loop, "next_step", without_absent)]


def _scales_out_of_range() -> list[Patch]:
    return [Patch(Autoscaling, "clamped", lambda self, replicas: replicas)]


def _grows_at_once() -> list[Patch]:
    return [Patch(decision, "GROWTH_MAX", 100)]


def _shrinks_at_once() -> list[Patch]:
    return [Patch(decision.Recommendations, "largest", lambda self, window_s, now: self._falling[-1][1])]


def _scales_during_updates() -> list[Patch]:
    return [Patch(module, "blocked", lambda service, least=0: "") for module in (decision, autoscaling_state)]


def _runs_overlap() -> list[Patch]:
    return [Patch(due, "_running_where", lambda view, service: None)]


def _is_always_going() -> list[Patch]:
    return [Patch(due, "_running_where", lambda view, service: "")]


def _waits_for_nodes_that_are_down() -> list[Patch]:
    def nodes_going(view: View, service: Service) -> list[str]:
        tasks = of_present_run(service, view.find(Task, service_id=service.id))
        return sorted({task.node_id for task in tasks if task.is_active and task.node_id})

    return [Patch(due, "nodes_going", nodes_going)]


def _publishes_anywhere() -> list[Patch]:
    class NoScope:
        SINGLE = object()

    return [Patch(scheduler_volumes, "VolumeScope", NoScope)]


def _shares_all_volumes() -> list[Patch]:
    class NoSharing:
        NONE = ONE_WRITER = READ_ONLY = object()

    return [Patch(scheduler_volumes, "VolumeSharing", NoSharing)]


def _keeps_finished_jobs() -> list[Patch]:
    return [Patch(jobs, "job_ttl_s", lambda labels: None)]


def _removes_finished_jobs() -> list[Patch]:
    return [Patch(jobs, "job_ttl_s", lambda labels: None if job_ttl_s(labels) is None else 0.0)]


def _never_fails() -> list[Patch]:
    return [Patch(update._Rollout, "_has_failed", lambda self, lead: False)]


def _never_overdue() -> list[Patch]:
    return [Patch(update._Rollout, "_is_overdue", lambda self, lead: False)]


def _never_completes() -> list[Patch]:
    return [Patch(update._Rollout, "complete", lambda self: iter(()))]


def _removes_in_disruptions() -> list[Patch]:
    return [
        Patch(module, "is_disrupted", lambda nodes, *, is_frozen: False) for module in (lost_nodes, node_loop)
    ]


def _decides_all_for_a_task() -> list[Patch]:
    return [Patch(orchestrator_state.OrchestratorState, "_slot_of_event", lambda self, task: None)]


# -- store only --------------------------------------------------------------------------------------------------------


def _admits_all() -> list[Patch]:
    return [Patch(Footprint, "is_compatible_with", lambda self, other: True)]


def _settles_at_once() -> list[Patch]:
    async def settle(self: batcher.Batcher, batch: batcher.Batch) -> None:
        await self._advance_epoch()
        for pending in batch.proposals:
            if pending in self._observed:
                pending.resolve(Committed(self._observed[pending]))
        self._requeue([pending for pending in batch.proposals if pending not in self._observed])

    return [Patch(batcher.Batcher, "_settle", settle)]


def _observes_nothing() -> list[Patch]:
    return [Patch(batcher.Batcher, "observe", lambda self, key, value, revision: None)]


def _without_compares(kind: type[Compare]) -> Callable[[], list[Patch]]:
    real = ProposalBuilder.proposal

    def proposal(self: ProposalBuilder) -> Any:
        whole = real(self)
        return replace(whole, compares=tuple(one for one in whole.compares if not isinstance(one, kind)))

    return lambda: [Patch(ProposalBuilder, "proposal", proposal)]


def _barrier_of_before() -> list[Patch]:
    async def wait_passed(self: store.SharedBarrier) -> None:
        needed = self._begun  # broken: accept the read index in progress, or the last one
        while self._passed < needed:
            async with self._turn:
                if self._passed >= needed:
                    return
                self._begun += 1
                mine = self._begun
                await self._round_trip()
                self._passed = max(self._passed, mine)

    return [Patch(store.SharedBarrier, "wait_passed", wait_passed)]


def _needs_no_barrier_among_several() -> list[Patch]:
    return [Patch(store.EtcdStore, "_shows_everything", property(lambda self: self._reflector.is_current))]


def _needs_no_barrier_before_the_watch() -> list[Patch]:
    return [Patch(store.EtcdStore, "_shows_everything", property(lambda self: self._is_only_member()))]


def _skips_a_revision() -> list[Patch]:
    real = SimulatedClient.watch
    return [Patch(SimulatedClient, "watch", lambda self, prefix, after: real(self, prefix, after + 1))]


def _no_difference() -> list[Patch]:
    async def nothing(self: Reflector, state: State) -> list[Event]:
        return []

    return [Patch(Reflector, "_difference", nothing)]


def _decides_on_the_past() -> list[Patch]:
    """Broken rule: decisions wait until the replica shows all acknowledged writes."""

    async def at_once(self: Updater, *_: object) -> None:
        return None

    return [
        Patch(Updater, name, at_once) for name in ("_wait_shown", "_own_writes_shown", "_settle_cancelled")
    ]


def _any_term() -> list[Patch]:
    """Broken rule: a manager whose member missed an election does not take the leader key back."""
    real = msgspec.json.decode

    def decode(stored: bytes, type: Any) -> Any:
        record = real(stored, type=type)
        return replace(record, term=0) if type is LeaderRecord else record

    class Json:
        encode = staticmethod(msgspec.json.encode)

    Json.decode = staticmethod(decode)  # type: ignore[attr-defined]

    class Msgspec:
        json = Json

    return [Patch(election, "msgspec", Msgspec)]


def _homeless() -> list[Patch]:
    return [Patch(Returning, "has_home", lambda self, task, view: False)]


# -- changes of leader ---------------------------------------------------------------------------------------------


def _counts_what_it_never_saw() -> list[Patch]:
    return [Patch(observed_times.ObservedTimes, "saw_created", lambda self, task: True)]


def _judges_what_it_never_saw() -> list[Patch]:
    return [
        Patch(observed_times.ObservedTimes, name, lambda self, task: True)
        for name in ("saw_start", "saw_end")
    ]


MUTANTS: tuple[Mutant, ...] = (
    Mutant("fence", "the leader's writes compare the leader key", _unfenced),
    Mutant("session compare", "reports of a node are accepted for its current session only", _any_session),
    Mutant("monotone states", "a report with an earlier state than the stored one is dropped", _any_state),
    Mutant("spread", "tasks of a service go to the nodes that have the fewest", _packed),
    Mutant("update order", "updates keep to start-first and stop-first", _other_order),
    Mutant("grace period", "a node is down after three missed heartbeats, not after one", _impatient),
    Mutant("name claims", "a name belongs to one service", _no_claims),
    Mutant("revisions", "a node rejects assignments older than the last ones", _any_revision),
    Mutant("restart delay", "a failed task is replaced after its delay", _no_delay),
    Mutant("barrier reads", "a read shows everything acknowledged before it", _stale_reads),
    Mutant("writer epoch", "the outcome of a write is determined before it is sent again", _sent_again),
    Mutant("one at a time", "a task starts after the one it replaces has stopped", _crowded_slots),
    Mutant("job bounds", "no more tasks of a job run than its limit", _all_runs_at_once),
    Mutant(
        "unknown since", "tasks on a node whose lease has expired are shown as unknown", _last_word_stands
    ),
    Mutant("adoption", "the leader adopts the sessions of a failed manager", _no_adoption),
    Mutant(
        "resources", "an assigned task leaves its node only when its resources no longer fit", _crowding_out
    ),
    Mutant("one attempt", "a slot with a task of the current spec gets no second one", _one_too_many),
    Mutant("clean return", "a node that is back drops tasks that were reassigned", _keepsakes),
    Mutant("sequence", "an update of a service names its current version", _any_version),
    Mutant("host ports", "a host port is held by one task per node", _shared_ports),
    Mutant("constraints", "tasks run on nodes that meet their constraints", _anywhere),
    Mutant("stop", "on-disconnect stop: a disconnected node stops its tasks by itself", _never_stopped),
    Mutant("done once", "a completed run of a job is not repeated", _again_and_again),
    Mutant("reports kept", "a report that could not be sent is sent later", _reports_once, focused.reports),
    Mutant("local volumes", "a task returns to the volumes of its slot", _homeless, focused.volumes),
    Mutant("causes", "an update is paused or rolled back only after a failure", _suspects_all),
    Mutant(
        "adopt",
        "a session is adopted only if the failed manager still owns it",
        _adopts_whatever_is_there,
        focused.sessions,
    ),
    *(
        Mutant(name, rule, patches, CROSSINGS[crossing], CROSSING_SEEDS)
        for name, rule, patches, crossing in (
            (
                "reconnection",
                "a node whose manager failed gets time to connect to another one",
                _no_patience,
                "no manager for a while",
            ),
            (
                "keep",
                "on-disconnect keep: tasks of a node that is down are not replaced",
                _always_replaced,
                "cut off and kept",
            ),
            (
                "used secrets",
                "a secret that a service uses is not removed",
                _removes_used_secrets,
                "secret that a service uses",
            ),
            (
                "secrets of runs",
                "a secret that a run of a job uses is not removed",
                _removes_secrets_of_runs,
                "secret that a run uses",
            ),
            ("shrinking", "a quota refuses nothing that shrinks", _may_not_shrink, "shrinks under a quota"),
            (
                "volumes given up",
                "an update stops what has the new task's volume",
                _gives_nothing_up,
                "update with a volume",
            ),
            (
                "single writers",
                "a node that may write to a volume is not removed as lost",
                _keeps_no_nodes,
                "cut off with a volume",
            ),
            (
                "only copies",
                "a node with data to keep is not removed as lost",
                _keeps_no_nodes,
                "lost with the only data",
            ),
            (
                "unreported data",
                "a task with data stays until its node has reported it",
                _deletes_unreported_tasks,
                "lost before its report",
            ),
            (
                "dry run",
                "the dry run refuses tasks that fit no node",
                _accepts_all,
                "update larger than any node",
            ),
            (
                "required jobs",
                "a job that a service requires does not remove itself",
                _removes_required_jobs,
                "dependency that removes itself",
            ),
            (
                "gone nodes",
                "tasks of a removed node are removed",
                _keeps_tasks_of_gone_nodes,
                "removed under a global service",
            ),
            (
                "given up",
                "a run of a job has no more attempts than its policy allows",
                _never_given_up,
                "retried under another clock",
            ),
            (
                "root rotation",
                "a rotation of the root ends once all nodes have new certificates",
                _rotates_without_absent_nodes,
                "rotated while a node is away",
            ),
            (
                "cron overlap",
                "a due run does not begin while the previous one runs",
                _runs_overlap,
                "due while a run goes on",
            ),
            (
                "cron reasons",
                "a due time is skipped only for a run that has not ended",
                _is_always_going,
                "due while a run goes on",
            ),
            (
                "cron nodes",
                "a node that is down delays no run of a global job",
                _waits_for_nodes_that_are_down,
                "due while its node is down",
            ),
            (
                "volume scope",
                "a volume for one node is used on one node",
                _publishes_anywhere,
                "volume that two tasks share",
            ),
            (
                "volume sharing",
                "a volume that tasks cannot share has one user",
                _shares_all_volumes,
                "volume that two tasks must not share",
            ),
            (
                "volume writers",
                "a volume with one writer is written by one task",
                _shares_all_volumes,
                "volume with one writer",
            ),
            (
                "failed update",
                "an update whose tasks fail is paused or rolled back",
                _never_fails,
                "update to a broken image",
            ),
            (
                "overdue update",
                "an update without progress ends after its deadline",
                _never_overdue,
                "update to a hanging image",
            ),
            (
                "updates end",
                "an update that has replaced all tasks completes",
                _never_completes,
                "update to a good image",
            ),
            (
                "victims",
                "tasks are preempted only for a higher priority",
                _preempts_equals,
                "task of equal priority",
            ),
            (
                "preemption off",
                "tasks are preempted only if the cluster allows it",
                _preempts_unasked,
                "task without preemption",
            ),
            (
                "preemption on",
                "tasks of higher priority get what lower ones hold",
                _preempts_nothing,
                "task of higher priority",
            ),
            (
                "due times",
                "a due time without a run is recorded with its reason",
                _passes_over_silently,
                "due while a run goes on",
            ),
            (
                "due once",
                "a due time is decided once",
                _decides_due_times_again,
                "due while a run goes on",
            ),
            (
                "quota",
                "the services of a stack request no more than its quota",
                _allows_any_use,
                "growth beyond a quota",
            ),
            (
                "waiting tasks",
                "a task gets a node once a node can run it",
                _refuses_forever,
                "more replicas than nodes may have",
            ),
            (
                "history",
                "a slot keeps no more ended tasks than its limit",
                _keeps_all_history,
                "updated often",
            ),
            (
                "run attempts",
                "a scheduled run has a limit of attempts",
                _tries_runs_without_end,
                "due and fails",
            ),
            (
                "spec versions",
                "a spec version goes with its last task",
                _keeps_spec_versions,
                "updated often",
            ),
            (
                "attempts",
                "a task that was moved uses up no attempt",
                _counts_moves,
                "drained often",
            ),
            (
                "disruption budget",
                "drains and updates together leave a service's least number of tasks available",
                _has_no_budget,
                "drained and updated",
            ),
            (
                "budget of labels",
                "changed node labels leave a service's least number of tasks available",
                _has_no_budget_for_labels,
                "relabeled at once",
            ),
            (
                "freezes",
                "tasks leave relabeled nodes during a freeze",
                _moves_during_freezes,
                "frozen",
            ),
            (
                "start first",
                "start-first is refused for volumes that tasks cannot share",
                _allows_start_first_with_volumes,
                "start-first with a volume",
            ),
            (
                "max replicas",
                "a node has no more replicas of a service than allowed",
                _any_number_per_node,
                "more replicas than nodes may have",
            ),
            (
                "job TTL",
                "a job removes itself when its time to live is over",
                _keeps_finished_jobs,
                "removes itself",
            ),
            (
                "job TTL kept",
                "a job does not remove itself before its time to live is over",
                _removes_finished_jobs,
                "removes itself",
            ),
            (
                "most nodes lost",
                "no node is removed while most nodes are lost",
                _removes_in_disruptions,
                "most nodes are lost",
            ),
        )
    ),
    Mutant(
        "visits",
        "a change of a node makes only its slots due",
        _decides_all_for_a_node,
        visits.simulate,
        CROSSING_SEEDS,
    ),
    Mutant(
        "visits of a task",
        "a change of a task makes only its slot due",
        _decides_all_for_a_task,
        visits.simulate,
        CROSSING_SEEDS,
    ),
    *(
        Mutant(name, rule, patches, focused.autoscaling)
        for name, rule, patches in (
            ("scaling range", "autoscaling keeps to its range", _scales_out_of_range),
            ("scaling growth", "autoscaling at most doubles the number of tasks", _grows_at_once),
            ("scaling window", "autoscaling removes no task within its window", _shrinks_at_once),
            ("scaling updates", "autoscaling does not scale during an update", _scales_during_updates),
        )
    ),
    *(
        Mutant(name, rule, patches, focused.maintenance)
        for name, rule, patches in (
            ("devices", "an exclusive device is given to one task at a time", _shared_devices),
            ("reboots", "a machine reboots when its tasks run elsewhere", _reboots_at_once),
            ("former specs", "a replaced spec becomes a revision", _keeps_no_specs),
            ("spec numbers", "the number of a revision is not used again", _numbers_again),
        )
    ),
    Mutant("reserve", "a node keeps what its labels reserve for its system", _reserves_nothing, run.extended),
    Mutant("versions", "constraints compare versions number by number", _compares_texts, run.extended),
    Mutant(
        "stack stop", "a stack's services are stopped and started", _stops_nothing, focused.stack_commands
    ),
    Mutant("one notice", "a repeated notification has the same id", _another_message, run.extended),
    Mutant(
        "dependencies",
        "a task waits for the services that its own depends on",
        _waits_for_nothing,
        run.extended,
    ),
    Mutant("full disks", "a node whose disk is full gets no new tasks", _ignores_disks, focused.disks),
    *(
        Mutant(name, rule, patches, run.extended)
        for name, rule, patches in (
            ("upgrade lock", "one upgrade has the cluster's lock", _shares_the_lock),
            ("upgrade plan", "an upgrade ends when all workers have the version", _leaves_workers_out),
        )
    ),
    *(
        Mutant(name, rule, patches, focused.stack_commands)
        for name, rule, patches in (
            ("killed deploys", "a deploy makes the changes of a killed one", _leaves_changes_to_others),
            ("rolled back", "a deploy whose service was rolled back fails", _overlooks_rollbacks),
            ("stack removal", "the removal of a stack leaves nothing", _keeps_configs),
        )
    ),
    *(
        Mutant(name, rule, patches, focused.allocations)
        for name, rule, patches in (
            ("address held", "a task holds its address until it has ended", _gives_back_early),
            ("address released", "the address of a task is free when it has ended", _gives_back_never),
            (
                "subnet released",
                "a removed network's subnet is free after its last task",
                _keeps_removed_networks,
            ),
            (
                "subnet held",
                "a removed network's subnet is held until its last task has ended",
                _forgets_removed_networks,
            ),
        )
    ),
    Mutant(
        "counts",
        "a new leader counts the restarts that it has seen",
        _counts_what_it_never_saw,
        differential.simulate,
    ),
    Mutant(
        "observations",
        "a new leader decides by what it has observed",
        _judges_what_it_never_saw,
        differential.simulate,
    ),
    *(
        Mutant(name, rule, patches, store_only.simulate, STORE_SEEDS)
        for name, rule, patches in (
            (
                "footprints",
                "a transaction that reads another one's writes is not batched with it",
                _admits_all,
            ),
            ("settling", "the outcome of a write is read once the replica shows it", _settles_at_once),
            ("markers", "a write whose response was lost is recognized in the watch", _observes_nothing),
            ("existence", "referenced objects exist at the commit", _without_compares(Exists)),
            ("no users", "removed objects are not referenced at the commit", _without_compares(NothingSince)),
            (
                "own barrier",
                "a round trip that began before a read does not count for it",
                _barrier_of_before,
            ),
            (
                "only member",
                "what other managers may have written is read after a round trip",
                _needs_no_barrier_among_several,
            ),
            (
                "late watch",
                "what was acknowledged and is not shown is waited for before a read",
                _needs_no_barrier_before_the_watch,
            ),
            ("no gap", "a watch continues where the one before it ended", _skips_a_revision),
            ("differences", "watchers get the differences that a load finds", _no_difference),
            ("shown first", "a leader decides once its replica shows its last write", _decides_on_the_past),
        )
    ),
    Mutant(
        "raft's term",
        "a leader of an older term does not take the key back",
        _any_term,
        store_only.elections,
    ),
)


def main() -> int:
    """Print the table of all mutants, or of the named ones.  Return 1 if a mutant survived."""
    parser = argparse.ArgumentParser(prog="python -m sim.mutants", description="Mutation tests.")
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="default: all")
    parser.add_argument("--processes", type=int, help="default: one per processor")
    args = parser.parse_args()
    if unknown := set(args.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"unknown mutants: {', '.join(sorted(unknown))}")
    chosen = [number for number, mutant in enumerate(MUTANTS) if not args.names or mutant.name in args.names]
    clock = SystemClock()
    began = clock.monotonic()
    sys.stdout.write(f"{'mutant':<18}{'killed by seed':>15}{'runs':>7}{'seconds':>9}  violation\n")
    with ProcessPoolExecutor(args.processes) as pool:
        verdicts = [pool.submit(_judge, number) for number in chosen]
        for verdict in (future.result() for future in verdicts):
            seed = "never" if verdict.seed is None else verdict.seed
            sys.stdout.write(
                f"{verdict.mutant:<18}{seed:>15}{verdict.runs:>7}{verdict.seconds:>9.1f}  "
                f"{verdict.violation.splitlines()[0] if verdict.violation else ''}\n"
            )
            sys.stdout.flush()
    survived = sum(future.result().seed is None for future in verdicts)
    sys.stdout.write(f"{len(verdicts)} mutants, {survived} survived, {clock.monotonic() - began:.0f} s\n")
    return 1 if survived else 0


def _judge(number: int) -> Verdict:
    return judge(MUTANTS[number])


if __name__ == "__main__":
    sys.exit(main())
