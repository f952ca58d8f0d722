"""Questions and answers inside the probes' VXLAN: sockets in their namespace.

Answers go out without a checksum (UDP over IPv4 may have none), so that whether they arrive says nothing about the
answering node's network card; questions go out with one where that is what is tried.  No packet is fragmented, and
none is held back for what the kernel believes of the way: only the device's MTU counts.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Collection

from skep.aio.clock import Clock
from skep.aio.race import is_set_within
from skep.aio.token_bucket import TokenBucket
from skep.dataplane.plan.probe import PORT
from skep.dataplane.probe.packets import Outcome, Said, answer, answered, asked, question

PAUSE_S = 0.1
"""Between two questions of a row: what loses one packet often loses its neighbours."""
WAIT_S = 1.0
"""For the last answer: twice what a signal needs around the earth."""

_SO_NO_CHECK = 11
_IP_MTU_DISCOVER, _PROBE = 10, 3
_DATAGRAM_BYTES_MAX = 1 << 16
_DATAGRAMS_PER_TURN = 64
_ANSWERS_AT_ONCE, _ANSWERS_PER_S = 200, 100
"""For each peer: an MTU's search asks 27 times within a second."""


class Sockets:
    """``asking`` with a port of its own, ``answering`` at ``PORT``, ``listening`` for TCP there."""

    def __init__(self, address: str) -> None:
        """In the calling thread's namespace, which has ``address``.  Raises: OSError."""
        opened: list[socket.socket] = []
        try:
            for kind, port in ((socket.SOCK_DGRAM, 0), (socket.SOCK_DGRAM, PORT), (socket.SOCK_STREAM, PORT)):
                one = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                opened.append(one)
                if kind == socket.SOCK_DGRAM:
                    one.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PROBE)
                else:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((address, port))
            opened[1].setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
        except BaseException:
            for one in opened:
                one.close()
            raise
        self.asking, self.answering, self.listening = opened

    def close(self) -> None:
        for one in (self.asking, self.answering, self.listening):
            one.close()


class _Question:
    """One that waits for its answer."""

    def __init__(self, row: "_Row", target: str, sent_at: float) -> None:
        self.row = row
        self.target = target
        self.sent_at = sent_at


class _Row:
    """Questions that belong together."""

    def __init__(self, enough: int) -> None:
        self.is_enough = asyncio.Event()
        self.round_trips: list[float] = []
        self.said: Said | None = None
        self._enough = enough

    def answered(self, round_trip_s: float, said: Said) -> None:
        self.round_trips.append(round_trip_s)
        self.said = said
        if len(self.round_trips) >= self._enough:
            self.is_enough.set()


class ProbeSocket:
    """Sends probes, and answers those of known peers.

    Args:
        says: what answers say.
        numbers: gives random numbers of 64 bits, one for each question, which its answer has to repeat.
    """

    def __init__(self, clock: Clock, says: Callable[[], Said], numbers: Callable[[], int]) -> None:
        self._clock = clock
        self._says = says
        self._numbers = numbers
        self._sockets: Sockets | None = None
        self._waiting: dict[int, _Question] = {}
        self._known: dict[str, TokenBucket] = {}
        self._heard_at: dict[str, float] = {}

    def use(self, sockets: Sockets) -> None:
        """Ask and answer by these from now on; they stay the caller's."""
        self.rest()
        self._sockets = sockets
        loop = asyncio.get_running_loop()
        loop.add_reader(sockets.asking, self._take_answers, sockets.asking)
        loop.add_reader(sockets.answering, self._take_questions, sockets.answering)

    def rest(self) -> None:
        """Use the sockets no more."""
        if self._sockets is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sockets.asking)
            loop.remove_reader(self._sockets.answering)
            self._sockets = None

    def know(self, addresses: Collection[str]) -> None:
        """Answer these, and no others."""
        now = self._clock.monotonic()
        self._known = {
            one: self._known.get(one) or TokenBucket(_ANSWERS_AT_ONCE, _ANSWERS_PER_S, now)
            for one in addresses
        }
        self._heard_at = {one: at for one, at in self._heard_at.items() if one in self._known}

    def knows(self, address: str) -> bool:
        return address in self._known

    def heard_within(self, address: str, seconds: float) -> bool:
        """Whether ``address`` has asked lately: its packets arrive here."""
        at = self._heard_at.get(address)
        return at is not None and self._clock.monotonic() - at <= seconds

    async def ask(
        self, target: str, *, size: int = 0, tries: int = 3, enough: int = 1, has_checksum: bool = False
    ) -> Outcome:
        """Ask ``target`` up to ``tries`` times, until ``enough`` answers have come.

        Args:
            size: of the UDP payload; the smallest question is sent where it is less.
            has_checksum: left to the network card where it offers that; otherwise there is none at all.
        """
        row, numbers, error = _Row(enough), [], ""
        try:
            for attempt in range(tries):
                number = self._numbers()
                numbers.append(number)
                self._waiting[number] = _Question(row, target, self._clock.monotonic())
                error = self._send(target, question(number, size), has_checksum=has_checksum) or error
                if await is_set_within(row.is_enough, PAUSE_S if attempt < tries - 1 else WAIT_S):
                    break
        finally:
            for number in numbers:
                self._waiting.pop(number, None)
        return Outcome(
            sent=len(numbers),
            answered=len(row.round_trips),
            round_trip_s=min(row.round_trips, default=None),
            error=error,
            said=row.said,
        )

    def _send(self, target: str, datagram: bytes, *, has_checksum: bool) -> str:
        if self._sockets is None:
            return "the probes have no device"
        try:
            self._sockets.asking.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, int(not has_checksum))
            self._sockets.asking.sendto(datagram, (target, PORT))
        except OSError as error:
            return "" if error.errno == errno.EMSGSIZE else error.strerror or str(error)
        return ""

    def _take_answers(self, source: socket.socket) -> None:
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                datagram, (sender, _) = source.recvfrom(_DATAGRAM_BYTES_MAX)
            except OSError:  # nothing waits, or a probe was refused
                return
            found = answered(datagram)
            if found is None:
                continue
            number, said = found
            waiting = self._waiting.get(number)
            if waiting is not None and waiting.target == sender:
                del self._waiting[number]
                waiting.row.answered(self._clock.monotonic() - waiting.sent_at, said)

    def _take_questions(self, source: socket.socket) -> None:
        now = self._clock.monotonic()
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                datagram, (sender, port) = source.recvfrom(_DATAGRAM_BYTES_MAX)
            except OSError:
                return
            allowance, number = self._known.get(sender), asked(datagram)
            if allowance is None or number is None or not allowance.take(now):
                continue
            self._heard_at[sender] = now
            try:
                source.sendto(answer(number, self._says()), (sender, port))
            except OSError:  # the peer probes again
                continue
