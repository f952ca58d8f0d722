"""The control loops of one leader.  They communicate only through the store."""

from random import Random
from typing import Protocol

from skep.aio.clock import Clock
from skep.manager.acme.calls import RunStep, skip_steps
from skep.manager.acme.loop import Certificates
from skep.manager.allocator.loop import Allocator
from skep.manager.autoscaling.loop import Autoscaler, Collect, Publish, Queries, skip_publishing
from skep.manager.autoscaling.state import AutoscalingCounts, Quota
from skep.manager.ca.loop import CertificateAuthority
from skep.manager.catalog.loop import RegistrationLeases
from skep.manager.control.quotas import check_quota
from skep.manager.gossip.keys import GossipKeyRotation
from skep.manager.notify.loop import Notifications
from skep.manager.notify.outbox import Send, skip_sending
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.orchestrator.reaper.loop import Reaper
from skep.manager.orchestrator.reaper.node_loop import LostNodes
from skep.manager.orchestrator.replacement.staging import CollectRequests, no_requests
from skep.manager.probes.loop import OverlayAvoidance
from skep.manager.queries.board import Ask, ask_nothing
from skep.manager.queries.node_questions import AskDoors, ask_no_doors
from skep.manager.rebalance.loop import Rebalancer
from skep.manager.scheduler.loop import Scheduler
from skep.manager.schedules.loop import ChangeFreezes, Schedules
from skep.manager.services.quotas import replicas_within_quota
from skep.manager.telemetry.task_usages import no_usages
from skep.manager.verify.loop import Verifier
from skep.manager.volumes.driver_calls import Confirm, FindDriver, no_drivers, skip_confirmation
from skep.manager.volumes.loop import VolumeManager
from skep.model.values.ids import IdSource
from skep.store.interface import LoopStore


class Loop(Protocol):
    """Runs until cancelled.  Raises ``NotLeader`` (in an ExceptionGroup) once its term is over."""

    async def run(self) -> None: ...


def loops(
    term: LoopStore,
    clock: Clock,
    new_id: IdSource,
    random: Random,
    incarnation: int = 0,
    *,
    find_driver: FindDriver = no_drivers,
    confirm: Confirm = skip_confirmation,
    collect_usages: Collect = no_usages,
    ask: Ask = ask_nothing,
    ask_doors: AskDoors = ask_no_doors,
    publish_answers: Publish = skip_publishing,
    collect_requests: CollectRequests = no_requests,
    counts: AutoscalingCounts | None = None,
    send: Send = skip_sending,
    run_step: RunStep = skip_steps,
) -> list[Loop]:
    """Return the loops of one term.  Each runs as a task of its own.

    Args:
        incarnation: Incarnation of the cluster.
        find_driver: Finds drivers of cluster volumes on this machine.
        confirm: Confirms the term before an action that no fence covers.
        collect_usages: Collects measurements of autoscaled services.
        ask: Asks queries, for autoscaling and staged updates.
        ask_doors: Asks front doors for idle times, before the last task of a service is removed.
        publish_answers: Shows the answers of autoscaling to other managers.
        collect_requests: Collects the HTTP requests of new tasks in staged updates.
        counts: Counters of changes by autoscaling.
        send: Sends notifications to their targets.
        run_step: Makes steps of orders at the authority for certificates.
    """
    kinds = (Allocator, Scheduler, Reaper, LostNodes, GossipKeyRotation, CertificateAuthority)
    return [
        Orchestrator(term, clock, new_id, random, collect_requests, ask),
        *(kind(term, clock, new_id, random) for kind in kinds),
        OverlayAvoidance(term, clock, random),
        ChangeFreezes(term, clock, random),
        RegistrationLeases(term, clock, random),
        Schedules(term, clock, random, incarnation),
        VolumeManager(term, clock, random, find_driver, confirm),
        Autoscaler(
            term,
            clock,
            collect_usages,
            Queries(random, ask, publish_answers, ask_doors),
            Quota(replicas_within_quota, check_quota),
            counts or AutoscalingCounts(),
        ),
        Notifications(term, clock, random, send, confirm),
        Verifier(term, clock),
        Certificates(term, clock, random, run_step, confirm),
        Rebalancer(term, clock),
    ]
