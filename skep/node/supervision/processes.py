"""The processes that a node supervises: net, wireguard-go if needed, and the manager if the node has one."""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.bootstrap import FUTILE, REMOVED, STARVED
from skep.dataplane.wireguard import process as wireguard_go
from skep.errors import Unavailable
from skep.model.node_reports.conditions import ConditionName
from skep.node.host.conditions import Conditions
from skep.node.supervision.responses import wait_manager_hung
from skep.node.supervision.supervisor import SupervisionPolicy, Supervisor
from skep.node.supervision.zygote import Zygote
from skep.paths import Paths

log = structlog.get_logger()

_REMOVED = (
    "The other managers do not admit this one: promote the node, or have it leave the swarm and join again."
)


class NodeProcesses:
    """Creates the supervisors of one node's processes.

    Args:
        rng: Returns numbers from 0 to 1.
        hand_over: Moves the store's leadership from the etcd member with this socket to another member.
    """

    def __init__(
        self,
        paths: Paths,
        zygote: Zygote,
        clock: Clock,
        rng: Callable[[], float],
        conditions: Conditions,
        hand_over: Callable[[Path], Awaitable[object]],
    ) -> None:
        self._paths = paths
        self._zygote = zygote
        self._clock = clock
        self._conditions = conditions
        self._hand_over = hand_over
        self._is_stopping = False
        self._new = partial(
            Supervisor,
            paths=paths,
            zygote=zygote,
            clock=clock,
            rng=rng,
            ends_with_node=lambda: self._is_stopping,
        )
        self.net = self._new("net", policy=SupervisionPolicy(hands_over=True, gives_up=False))

    def new_wireguard(self, slot: int) -> Supervisor:
        """Return the supervisor of the wireguard-go in ``slot``, not yet running.  The process outlives the node."""
        policy = SupervisionPolicy(gives_up=False, version=wireguard_go.VERSION, outlives_node=True)
        return self._new(wireguard_go.process_name(slot), policy=policy)

    def new_manager(self) -> Supervisor:
        """Return the supervisor of a manager process, not yet running."""
        policy = SupervisionPolicy(
            final={REMOVED: _REMOVED},
            futile=FUTILE,
            starved=STARVED,
            show_condition=self._conditions.reporter(ConditionName.MANAGER),
            wait_hung=partial(wait_manager_hung, self._paths, self._hand_over, self._clock),
        )
        return self._new("manager", policy=policy)

    async def keep_spare_manager(self, wanted: bool) -> None:
        """Let the zygote fork a manager process in advance, or end it if not ``wanted``."""
        try:
            await self._zygote.keep_spare("manager", wanted=wanted)
        except Unavailable as error:
            log.warning("no spare manager process", reason=str(error))

    def stop_with_node(self) -> None:
        """Stop each process when its supervisor is cancelled, from now on, because the node stops as planned."""
        self._is_stopping = True
