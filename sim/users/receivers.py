"""A target of notifications that often fails, and the rule that it gets each notice once."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

from skep.manager.notify.messages import Message
from skep.manager.notify.records import Target
from skep.model.options.notifications import Topic

TARGET = Target(
    id="t1", name="ops", url="https://ops.example.org/", topics=(Topic.NODE, Topic.SERVICE, Topic.DEPLOY)
)
REFUSED = 1 / 3
"""Probability that a message is refused, so that many messages are sent again, also by the next leader."""
SLOW_S = 3.0
"""Longest time before and after a message is accepted.  A leader may crash meanwhile."""


class Receiver:
    """A target that refuses a third of the messages, and is slow.  It keeps each message once by its id."""

    def __init__(self, random: Random, note: Callable[[Iterable[str]], None], slow_s: float = SLOW_S) -> None:
        """``note`` records violated rules."""
        self._random = random
        self._slow_s = slow_s
        self._note = note
        self.messages: dict[str, Message] = {}
        self._since = 0
        """Number of messages before the last restore.  The restored state does not have their results."""
        self.copies = 0
        self.in_doubt = False
        """Whether it has accepted a message whose result no leader knows yet."""

    async def notify(self, target: Target, message: Message) -> str:
        """Receive a message.  Return the reason of a refusal."""
        await asyncio.sleep(self._random.uniform(0.0, self._slow_s))
        if self._random.random() < REFUSED:
            return "it responded 503"
        self.copies += message.id in self.messages
        if self.messages.setdefault(message.id, message) != message:
            self._note([f"a copy of notification {message.id} has another content"])
        self._note(self._repeated(message))
        self.in_doubt = True
        try:
            await asyncio.sleep(self._random.uniform(0.0, self._slow_s))
        finally:
            self.in_doubt = False
        return ""

    def restore(self) -> None:
        """Accept incidents again after a restore of an older state.  An id still means one content."""
        self._since = len(self.messages)

    def told(self, status: str) -> Counter[str]:
        """Return how often the begin or the end of each incident was told since the last restore."""
        notices = [one for message in [*self.messages.values()][self._since :] for one in message.notices]
        return Counter(one.incident.id for one in notices if one.status == status)

    def _repeated(self, message: Message) -> Iterable[str]:
        began, ended = self.told("began"), self.told("ended")
        for one in message.notices:
            id = one.incident.id
            if began[id] > 1 or ended[id] > 1:
                yield f"incident {id} is told {began[id]} times when it begins, {ended[id]} times when it ends"
