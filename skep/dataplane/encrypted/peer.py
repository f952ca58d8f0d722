"""One other node, as the forwarder knows it: keys, session, greetings.  No I/O; time and chance are arguments.

The forwarder's lock is held while it changes.  The carrying thread reads ``sealer`` and openers without it: they are
replaced, never altered by another thread.
"""

from collections.abc import Callable, Iterable
from hmac import compare_digest

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from skep.aio.allowance import Allowance
from skep.dataplane.encrypted.greeting import (
    CHALLENGE_BYTES,
    NO_CHALLENGE,
    Greeting,
    epoch_of,
    key_of,
    opened,
    sealed,
)
from skep.dataplane.encrypted.sealing import Opener, Sealer, Session, agree
from skep.model.ids import NodeId
from skep.model.pair_keys import PairKey

FIRST_RETRY_S = 0.1
RETRY_S_MAX = 2.0
KEEP_S = 15.0
"""A greeting goes to a quiet peer that often (jittered): whether it still is who it was."""
_ANSWERS_AT_ONCE, _ANSWERS_PER_S = 10, 20
"""A greeting, or an echo, that is sent again and again gets few answers."""


class Peer:
    """Everything between this forwarder and that of ``node_id``.

    Args:
        random_bytes: of the system; keys and challenges are made of it.
        chance: from 0 to 1, spreads what is repeated.
    """

    def __init__(
        self,
        node_id: NodeId,
        address: str,
        *,
        random_bytes: Callable[[int], bytes],
        chance: Callable[[], float],
        now: float,
    ) -> None:
        self.node_id = node_id
        self.address = address
        self.sealer: Sealer | None = None
        """None: not agreed yet; nothing is sent."""
        self._random_bytes = random_bytes
        self._chance = chance
        self._make_pair()
        self._keys: dict[int, PairKey] = {}
        self._greeting_keys: dict[int, tuple[AESGCM, AESGCM]] = {}
        """By epoch: to seal with, to open with."""
        self._last_dropped = -1
        self._session: Session | None = None
        self._peer_epochs: tuple[int, ...] = ()
        self._openers: dict[tuple[int, int], Opener] = {}
        self._challenge = self._new_challenge()
        self._heard = NO_CHALLENGE
        self._is_pending = True
        self._attempts = 0
        self._next_at = now
        self._answers = Allowance(_ANSWERS_AT_ONCE, _ANSWERS_PER_S, now)
        self._echoes = Allowance(_ANSWERS_AT_ONCE, _ANSWERS_PER_S, now)

    @property
    def epochs(self) -> tuple[int, ...]:
        """Those that keys are here for, oldest first."""
        return tuple(sorted(self._keys))

    @property
    def is_agreed(self) -> bool:
        """Whether frames can go to it."""
        return self.sealer is not None

    @property
    def lost(self) -> int:
        """Units of it that were begun and never completed."""
        return sum(opener.reassembly.lost for opener in self._openers.values())

    def use(self, keys: Iterable[PairKey], now: float) -> None:
        """From now on these are the keys.  An epoch that was dropped for later ones does not come back.

        Without any key all is forgotten: the nodes share no network at present.  They may share one again in the same
        epoch, and agree then as two that have never met, so that no counter is taken twice.
        """
        fresh = {key.epoch: key for key in keys if key.epoch > self._last_dropped}
        if fresh == self._keys:
            return
        if not fresh:
            self._forget()
            return
        gone = self._keys.keys() - fresh.keys()
        self._last_dropped = max(gone, default=self._last_dropped)
        self._keys = {epoch: key for epoch, key in fresh.items() if epoch > self._last_dropped}
        self._greeting_keys = {
            epoch: (key_of(key.sending), key_of(key.receiving)) for epoch, key in self._keys.items()
        }
        self._refresh()
        self.ask(now)

    def _forget(self) -> None:
        self._make_pair()
        self.sealer = self._session = None
        self._keys, self._greeting_keys, self._openers = {}, {}, {}
        self._peer_epochs = ()
        self._is_pending = False

    def _make_pair(self) -> None:
        self._private = X25519PrivateKey.from_private_bytes(self._random_bytes(32))
        self.public = self._private.public_key().public_bytes_raw()

    def ask(self, now: float) -> None:
        """Begin to greet, unless that has begun already."""
        if not self._is_pending:
            self._is_pending = True
            self._attempts = 0
            self._next_at = now

    def due(self, now: float) -> bytes | None:
        """The greeting to send at ``now``, if it is time for one."""
        if now < self._next_at or not self._keys:
            return None
        # Under the newest epoch first; one that the other may not know yet is followed by the ones before it.
        epochs = self.epochs
        epoch = epochs[-1 - self._attempts % len(epochs)]
        pause_s = min(FIRST_RETRY_S * 2 ** min(self._attempts, 10), RETRY_S_MAX)
        self._attempts += 1
        self._is_pending = True
        self._next_at = now + pause_s * (0.5 + self._chance() / 2)
        return self._greeting(epoch, wants_answer=True)

    def greeted(self, datagram: memoryview, now: float) -> tuple[bool, bytes | None]:
        """A greeting arrived: whether it is the peer's, and what to answer."""
        epoch = epoch_of(datagram)
        keys = None if epoch is None else self._greeting_keys.get(epoch)
        greeting = None if keys is None else opened(datagram, keys[1])
        if epoch is None or greeting is None:
            return False, None
        is_believed = compare_digest(greeting.echo, self._challenge) and self._accept(greeting, now)
        if not greeting.wants_answer or not self._answers.take(now):
            return True, None
        self._heard = greeting.challenge
        return True, self._greeting(epoch, wants_answer=not is_believed)

    def opener(self, epoch: int, session: int) -> Opener | None:
        """Who opens what the peer sends under ``epoch`` in ``session``."""
        return self._openers.get((epoch, session))

    def may_echo(self, now: float) -> bool:
        """Whether one more question if this node can be reached is answered."""
        return self._echoes.take(now)

    def has_epoch(self, epoch: int) -> bool:
        return epoch in self._keys

    def _accept(self, greeting: Greeting, now: float) -> bool:
        if self._session is None or self._session.peer_public != greeting.public:
            try:
                session = agree(self._private, self.public, greeting.public)
            except ValueError:
                return False
            self._session = session
            self._openers = {}
        self._challenge = self._new_challenge()
        self._heard = greeting.challenge
        self._peer_epochs = greeting.epochs
        self._is_pending = False
        self._attempts = 0
        self._next_at = now + KEEP_S * (0.5 + self._chance() / 2)
        self._refresh()
        return True

    def _refresh(self) -> None:
        """Openers for all epochs that are known here, a sealer for the newest that both know."""
        session = self._session
        if session is None:
            return
        self._openers = {
            (epoch, session.number): self._openers.get((epoch, session.number))
            or Opener(session, key.receiving)
            for epoch, key in self._keys.items()
        }
        newest = max(self._keys.keys() & set(self._peer_epochs), default=None)
        if newest is None:
            self.sealer = None
        elif self.sealer is None or (self.sealer.epoch, self.sealer.session) != (newest, session.number):
            self.sealer = Sealer(session, newest, self._keys[newest].sending)

    def _greeting(self, epoch: int, *, wants_answer: bool) -> bytes:
        greeting = Greeting(self._challenge, self._heard, self.public, wants_answer, self.epochs)
        return sealed(greeting, epoch, self._greeting_keys[epoch][0], self._random_bytes)

    def _new_challenge(self) -> bytes:
        return self._random_bytes(CHALLENGE_BYTES)
