"""Sends the recorded messages of one leader, and records the results."""

from collections.abc import Awaitable, Callable
from functools import partial
from random import Random

import structlog

from skep.aio.clock import Clock
from skep.aio.failures import isolate, retry
from skep.errors import SkepError
from skep.manager.cluster import known_cluster
from skep.manager.notify.messages import Message, message_of
from skep.manager.notify.records import Delivery, Target
from skep.manager.notify.writing import claim, settle
from skep.store.interface import LoopStore, NotLeader

log = structlog.get_logger(__name__)

Send = Callable[[Target, Message], Awaitable[str]]
"""Sends a message within a deadline.  Returns the reason of a failure, or an empty text."""


async def skip_sending(target: Target, message: Message) -> str:
    """Send nothing.  The simulation has no network."""
    return ""


class Outbox:
    """Sends at most one message to each target at a time."""

    def __init__(
        self,
        term: LoopStore,
        clock: Clock,
        random: Random,
        send: Send,
        confirm: Callable[[], Awaitable[None]],
    ) -> None:
        """``confirm`` confirms the term before an attempt, which no fence covers."""
        self._term = term
        self._clock = clock
        self._random = random
        self._send = send
        self._confirm = confirm
        self._busy: set[str] = set()

    def is_busy(self, target: Target) -> bool:
        """Return whether a message to this target is being sent."""
        return target.name in self._busy

    async def deliver(self, target: Target) -> bool:
        """Send the next message to ``target``, if there is one.  Returns False if the store refused a write.

        Raises: NotLeader.
        """
        self._busy.add(target.name)
        try:
            await self._confirm()
            delivery = await self._term.update(claim, target, self._clock.now_ns())
            if delivery is not None:
                await self._attempt(target, delivery)
        except NotLeader:
            raise
        except SkepError as error:
            log.warning("notification not recorded, will retry", target=target.name, reason=str(error))
            return False
        finally:
            self._busy.discard(target.name)
        return True

    async def _attempt(self, target: Target, delivery: Delivery) -> None:
        swarm = known_cluster(self._term.view())
        name, id = (swarm.spec.name, str(swarm.id)) if swarm is not None else ("", "")
        sending = self._send(target, message_of(delivery, name, id))
        error = await isolate(sending, "notification not sent", target=target.name)
        if error is None:
            error = "internal error: see the log of the leader"
        if error and not delivery.attempts:
            log.warning("notification not delivered, will retry", target=target.name, reason=error)
        elif not error:
            log.info("notification delivered", target=target.name, notices=len(delivery.sending))
        body = partial(
            settle,
            target=target,
            number=delivery.number,
            error=error,
            now_ns=self._clock.now_ns(),
            chance=self._random.random(),
        )
        # The target may have the message, so its result is written before anything else is sent to it.
        await retry(
            partial(self._term.update, body),
            "result of a notification not written, will retry",
            clock=self._clock,
            rng=self._random.random,
            passes=(NotLeader,),
            kinds=(SkepError,),
        )
