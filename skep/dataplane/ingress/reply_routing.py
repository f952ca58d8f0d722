"""Keeps the reply routing of this node's containers up to date with nodes and containers
(``plan/reply_routing.py``)."""

import asyncio
from contextlib import suppress

import structlog

from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.plan.ingress import IngressPlan
from skep.dataplane.plan.reply_routing import IngressEndpoint, reply_routing
from skep.errors import SkepError
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

_AT_ONCE_MAX = 16
"""Limit for the namespaces that are changed at the same time, equal to the number of threads for that."""
_PART = "reply routing"


class ReplyRouting:
    """The reply routing of all containers of this node that are on the ingress network."""

    def __init__(self, healer: Healer) -> None:
        self._healer = healer
        self._endpoints: dict[ContainerId, tuple[NetnsReconciler, IngressEndpoint]] = {}
        self._plan = IngressPlan()
        self._changing = asyncio.Lock()

    async def add(
        self, container_id: ContainerId, reconciler: NetnsReconciler, endpoint: IngressEndpoint
    ) -> None:
        """Add a container on the ingress network.  Returns when its replies are routed.  Raises: SkepError, OSError."""
        async with self._changing:
            self._endpoints[container_id] = (reconciler, endpoint)
            await self._healer.watch_tables(reconciler)
            await self._apply(reconciler, endpoint)

    def remove(self, container_id: ContainerId) -> None:
        """Forget a container.  Its rules are removed together with its namespace."""
        self._endpoints.pop(container_id, None)

    async def apply(self, plan: IngressPlan) -> None:
        """Apply ``plan`` to all containers.  A failure is logged and repaired later."""
        async with self._changing:
            self._plan = plan
            limit = asyncio.Semaphore(_AT_ONCE_MAX)

            async def one(container_id: ContainerId) -> None:
                async with limit:
                    try:
                        with suppress(KeyError):  # it was removed meanwhile
                            await self._apply(*self._endpoints[container_id])
                    except (SkepError, OSError) as error:
                        log.warning("reply routing not applied", container=container_id, error=str(error))

            await asyncio.gather(*map(one, tuple(self._endpoints)))

    async def _apply(self, reconciler: NetnsReconciler, endpoint: IngressEndpoint) -> None:
        if self._plan.subnets:
            state, tables = reply_routing(self._plan, endpoint)
            reconciler.set_part(_PART, state, *tables)
            await reconciler.apply()
