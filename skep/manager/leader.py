"""The election, and the control loops that run for each term in which this manager leads."""

import asyncio

import structlog

from skep.csi.drivers import Drivers
from skep.manager.acme.calls import AuthorityCalls
from skep.manager.acme.dns_hook import DnsHook
from skep.manager.control.validation.new_objects import known_task
from skep.manager.control_loops.loops import loops
from skep.manager.dispatcher.node_sessions.adoption import SessionAdoption
from skep.manager.environment import ManagerEnvironment
from skep.manager.eviction.loop import Evictions
from skep.manager.journal.loop import Journal
from skep.manager.link.loop import ManagerLink
from skep.manager.manager_status import ManagerStatusWriter
from skep.manager.membership.loop import ManagerReconciler
from skep.manager.nodes.tunnels import NodeTunnels
from skep.manager.notify.sending import MessageSender
from skep.manager.observation import ManagerObservation
from skep.manager.queries.asking import QueryClient
from skep.manager.queries.node_questions import NodeQuestions
from skep.manager.store_member import StoreMember
from skep.store.interface import NotLeader, Term

log = structlog.get_logger(__name__)


class Leader:
    """Leads the cluster while elected.  Each write of the control loops is fenced by its term."""

    def __init__(
        self,
        environment: ManagerEnvironment,
        link: ManagerLink,
        member: StoreMember,
        status: ManagerStatusWriter,
        observation: ManagerObservation,
        journal: Journal,
        tunnels: NodeTunnels,
    ) -> None:
        self._environment = environment
        self._link = link
        self._member = member
        self._status = status
        self._observation = observation
        self._journal = journal
        self._tunnels = tunnels
        self._authority = AuthorityCalls(DnsHook(environment.config.acme_dns_hook))

    async def run(self) -> None:
        """Lead whenever this manager is elected, until cancelled."""
        environment = self._environment
        async for term in environment.store.terms(environment.own, environment.config.advertise_addr):
            log.info("leadership gained", term=term.number)
            self._status.lead(term)
            async with asyncio.TaskGroup() as group:
                leading = group.create_task(self._lead(term), name=f"lead-{term.number}")
                await term.wait_lost()
                leading.cancel()
            self._status.lead(None)
            # The old term has ended before a new one starts.
            log.info("leadership lost", term=term.number)

    async def _lead(self, term: Term) -> None:
        """Run the control loops for one term.  Returns early if a write showed that the term is over."""
        config, store, clock, new_id, random = self._environment
        member, channel_to = self._member, self._link.channel
        questions = NodeQuestions(
            self._tunnels, store.view, random, lambda view, task: known_task(view, task).machine_rights
        )
        try:
            async with asyncio.TaskGroup() as group:
                managers = ManagerReconciler(
                    term, config.node_id, member.member.consensus, self._link, clock, random
                )
                group.create_task(managers.run(), name="managers")
                evictions = Evictions(term, config.node_id, member.keys, channel_to, clock, new_id, random)
                group.create_task(evictions.run(), name="evictions")
                adoption = SessionAdoption(term, config.node_id, self._link.silent, clock, new_id, random)
                group.create_task(adoption.run(), name="adoption")
                group.create_task(member.space.keep(), name="store's space")
                group.create_task(self._journal.lead(term), name="journal")
                for loop in loops(
                    term,
                    clock,
                    new_id,
                    random,
                    store.incarnation,
                    find_driver=Drivers(config.paths.csi_sockets, clock).get,
                    confirm=term.confirm,
                    collect_usages=self._observation.usages.collect,
                    ask=QueryClient(store.view, run_command=questions.run_command).ask,
                    ask_doors=questions.ask_doors,
                    publish_answers=self._observation.publish_answers,
                    collect_requests=self._observation.usages.collect_requests,
                    counts=self._observation.autoscaling,
                    send=MessageSender(store.view, clock).send,
                    run_step=self._authority.run_step,
                ):
                    group.create_task(loop.run(), name=type(loop).__name__)
        except* NotLeader:
            log.info("write refused: there is a newer leader", term=term.number)
