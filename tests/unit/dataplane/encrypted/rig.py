"""Two ends of an encrypted network without a kernel: what one says is handed to the other."""

import random
from collections.abc import Sequence

from skep.dataplane.encrypted.peer import Peer
from skep.model.ids import NodeId
from skep.model.pair_keys import PairKey


def a_key(epoch: int) -> PairKey:
    """As the node that sends "there" sees it."""
    return PairKey(epoch, _bytes(b"there", epoch), _bytes(b"back", epoch))


def mirrored(keys: Sequence[PairKey]) -> list[PairKey]:
    """The same keys as the other node sees them."""
    return [PairKey(key.epoch, key.receiving, key.sending) for key in keys]


class Ends:
    """Node A's idea of B (``b_at_a``), and B's of A; their datagrams of greetings pass through ``between``."""

    def __init__(
        self, epochs: Sequence[int] = (1,), seed: int = 1, keys: Sequence[PairKey] | None = None
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.said: list[tuple[str, bytes]] = []
        self.keys = list(keys) if keys is not None else [a_key(epoch) for epoch in epochs]
        self.b_at_a = self.a_peer("b", self.keys)
        self.a_at_b = self.a_peer("a", mirrored(self.keys))

    def a_peer(self, name: str, keys: Sequence[PairKey]) -> Peer:
        peer = Peer(
            NodeId(name), name, random_bytes=self.random.randbytes, chance=self.random.random, now=self.now
        )
        peer.use(keys, self.now)
        return peer

    def tell(self, epochs: Sequence[int], *, a: bool = True, b: bool = True) -> None:
        keys = [a_key(epoch) for epoch in epochs]
        if a:
            self.b_at_a.use(keys, self.now)
        if b:
            self.a_at_b.use(mirrored(keys), self.now)

    def talk(self, for_s: float = 1.0) -> None:
        """Greetings go back and forth for that long, none lost."""
        end = self.now + for_s
        while self.now < end:
            for peer, to in ((self.b_at_a, "b"), (self.a_at_b, "a")):
                datagram = peer.due(self.now)
                if datagram is not None:
                    self.deliver(to, datagram)
            self.now += 0.05

    def deliver(self, to: str, datagram: bytes | None) -> None:
        """Hand ``datagram`` to node ``to``, its answer to the other, and so on."""
        while datagram is not None:
            self.said.append((to, datagram))
            receiver = self.a_at_b if to == "b" else self.b_at_a
            _, datagram = receiver.greeted(memoryview(datagram), self.now)
            to = "a" if to == "b" else "b"

    @property
    def is_agreed(self) -> bool:
        return self.b_at_a.is_agreed and self.a_at_b.is_agreed


def _bytes(direction: bytes, epoch: int) -> bytes:
    return (direction + epoch.to_bytes(4, "big")).ljust(32, b".")
