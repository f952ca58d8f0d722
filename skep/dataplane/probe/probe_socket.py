"""Sends and receives probes inside the probes' VXLAN, over sockets in their namespace.

Responses have no checksum (UDP over IPv4 allows that), so that the responding node's network card cannot influence
whether they arrive.  Requests have a checksum only if checksums are tested.  No packet is fragmented, and the kernel's
path MTU is ignored, so only the device's MTU limits the size.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Collection

from skep.aio.clock import Clock
from skep.aio.race import is_set_within
from skep.aio.token_bucket import TokenBucket
from skep.dataplane.plan.probe import PORT
from skep.dataplane.probe.packets import (
    Outcome,
    PeerMeasurements,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

PAUSE_S = 0.1
"""Seconds between two requests of a series, because losses come in bursts."""
WAIT_S = 1.0
"""Seconds to wait for the last response, several times the longest round trip on earth."""

# Source: asm-generic/socket.h and linux/in.h: IP_MTU_DISCOVER, IP_PMTUDISC_PROBE.
_SO_NO_CHECK = 11
_IP_MTU_DISCOVER, _PROBE = 10, 3
_DATAGRAM_BYTES_MAX = 1 << 16
"""Buffer size in bytes.  No datagram is longer."""
_DATAGRAMS_PER_TURN = 64
_RESPONSE_BURST, _RESPONSES_PER_S = 200, 100
"""Limits for the responses to each peer: a burst of so many, then so many a second.

The search for a path MTU sends 27 requests within a second.
"""


class Sockets:
    """Three sockets: ``requesting`` at a free UDP port, ``responding`` at UDP ``PORT``, and ``listening`` at TCP
    ``PORT``.
    """

    def __init__(self, address: str) -> None:
        """Open the sockets in the calling thread's namespace, which has ``address``.  Raises: OSError."""
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
        self.requesting, self.responding, self.listening = opened

    def close(self) -> None:
        """Close all three sockets."""
        for one in (self.requesting, self.responding, self.listening):
            one.close()


class _PendingRequest:
    """A request that has no response yet."""

    def __init__(self, series: "_Series", target: str, sent_at: float) -> None:
        self.series = series
        self.target = target
        self.sent_at = sent_at


class _Series:
    """Requests to one target whose responses are counted together."""

    def __init__(self, enough: int) -> None:
        self.is_enough = asyncio.Event()
        self.round_trips: list[float] = []
        self.peer: PeerMeasurements | None = None
        self._enough = enough

    def add_response(self, round_trip_s: float, peer: PeerMeasurements) -> None:
        self.round_trips.append(round_trip_s)
        self.peer = peer
        if len(self.round_trips) >= self._enough:
            self.is_enough.set()


class ProbeSocket:
    """Sends probe requests, and responds to peers' requests.

    Args:
        measurements: Returns the content of responses.
        nonces: Returns 64 random bits for each request.  The response must repeat them.
    """

    def __init__(
        self, clock: Clock, measurements: Callable[[], PeerMeasurements], nonces: Callable[[], int]
    ) -> None:
        self._clock = clock
        self._measurements = measurements
        self._nonces = nonces
        self._sockets: Sockets | None = None
        self._pending: dict[int, _PendingRequest] = {}
        self._peers: dict[str, TokenBucket] = {}
        self._received_at: dict[str, float] = {}

    def attach(self, sockets: Sockets) -> None:
        """Use ``sockets`` from now on.  The caller closes them after ``detach``."""
        self.detach()
        self._sockets = sockets
        loop = asyncio.get_running_loop()
        loop.add_reader(sockets.requesting, self._read_responses, sockets.requesting)
        loop.add_reader(sockets.responding, self._read_requests, sockets.responding)

    def detach(self) -> None:
        """Stop using the sockets."""
        if self._sockets is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sockets.requesting)
            loop.remove_reader(self._sockets.responding)
            self._sockets = None

    def set_peers(self, addresses: Collection[str]) -> None:
        """Respond to these addresses and to no others."""
        now = self._clock.monotonic()
        self._peers = {
            one: self._peers.get(one) or TokenBucket(_RESPONSE_BURST, _RESPONSES_PER_S, now)
            for one in addresses
        }
        self._received_at = {one: at for one, at in self._received_at.items() if one in self._peers}

    def is_peer(self, address: str) -> bool:
        """Return whether requests from ``address`` get responses."""
        return address in self._peers

    def received_within(self, address: str, seconds: float) -> bool:
        """Return whether a request from ``address`` has arrived in the last ``seconds``."""
        at = self._received_at.get(address)
        return at is not None and self._clock.monotonic() - at <= seconds

    async def probe(
        self, target: str, *, size: int = 0, tries: int = 3, enough: int = 1, has_checksum: bool = False
    ) -> Outcome:
        """Send up to ``tries`` requests to ``target``, until there are ``enough`` responses.

        Args:
            size: Bytes of the UDP payload, raised to the smallest request's size.
            has_checksum: Whether requests have a checksum, which is left to the network card if it offers that.
        """
        series, nonces, error = _Series(enough), [], ""
        try:
            for attempt in range(tries):
                nonce = self._nonces()
                nonces.append(nonce)
                self._pending[nonce] = _PendingRequest(series, target, self._clock.monotonic())
                error = self._send(target, encode_request(nonce, size), has_checksum=has_checksum) or error
                if await is_set_within(series.is_enough, PAUSE_S if attempt < tries - 1 else WAIT_S):
                    break
        finally:
            for nonce in nonces:
                self._pending.pop(nonce, None)
        return Outcome(
            sent=len(nonces),
            answered=len(series.round_trips),
            round_trip_s=min(series.round_trips, default=None),
            error=error,
            peer=series.peer,
        )

    def _send(self, target: str, datagram: bytes, *, has_checksum: bool) -> str:
        if self._sockets is None:
            return "the probes have no device"
        try:
            self._sockets.requesting.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, int(not has_checksum))
            self._sockets.requesting.sendto(datagram, (target, PORT))
        except OSError as error:
            return "" if error.errno == errno.EMSGSIZE else error.strerror or str(error)
        return ""

    def _read_responses(self, source: socket.socket) -> None:
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                datagram, (sender, _) = source.recvfrom(_DATAGRAM_BYTES_MAX)
            except OSError:  # nothing to read, or the kernel reports that a request was refused
                return
            found = decode_response(datagram)
            if found is None:
                continue
            nonce, measurements = found
            pending = self._pending.get(nonce)
            if pending is not None and pending.target == sender:
                del self._pending[nonce]
                pending.series.add_response(self._clock.monotonic() - pending.sent_at, measurements)

    def _read_requests(self, source: socket.socket) -> None:
        now = self._clock.monotonic()
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                datagram, (sender, port) = source.recvfrom(_DATAGRAM_BYTES_MAX)
            except OSError:
                return
            bucket, nonce = self._peers.get(sender), decode_request(datagram)
            if bucket is None or nonce is None or not bucket.take(now):
                continue
            self._received_at[sender] = now
            try:
                source.sendto(encode_response(nonce, self._measurements()), (sender, port))
            except OSError:  # the peer probes again
                continue
