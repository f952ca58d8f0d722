"""From the TAPs to the other nodes."""

import errno
import os
import socket
import struct

from skep.dataplane.encrypted.answers import answer, is_neighbours_talk
from skep.dataplane.encrypted.counters import Counters
from skep.dataplane.encrypted.frames import FRAME_BYTES_MAX, LENGTH, VNET_BYTES, pack, room
from skep.dataplane.encrypted.peer import Peer
from skep.dataplane.encrypted.routes import Carrier

SOL_UDP, UDP_SEGMENT = 17, 103
_SEGMENTS_MAX = 64
"""Pieces that the kernel takes in one call (UDP_MAX_SEGMENTS)."""
_SEGMENTED_BYTES_MAX = 65000
_FRAMES_PER_TURN = 64
"""Of one TAP before the next one's turn."""
_MULTICAST = 1
_UNSEGMENTED = (errno.EINVAL, errno.EIO, errno.EMSGSIZE)
"""What the kernel says where segmentation does not work: a device without checksums, a smaller MTU on the way."""


class Sender:
    """Reads frames, seals them, sends them.  The carrying thread's."""

    def __init__(self, sock: socket.socket, port: int) -> None:
        self.counters = Counters()
        self._socket = sock
        self._port = port
        self._buffer = bytearray(LENGTH.size + FRAME_BYTES_MAX)
        self._view = memoryview(self._buffer)

    def turn(self, carrier: Carrier, piece: int) -> bool:
        """Send what waits in one TAP, up to 64 frames; whether the device is still there."""
        small: dict[Peer, list[bytes]] = {}
        sizes: dict[Peer, int] = {}
        space = room(piece)
        is_there = True
        for _ in range(_FRAMES_PER_TURN):
            try:
                length = os.readv(carrier.tap, [self._view[LENGTH.size :]])
            except BlockingIOError:
                break
            except OSError:
                is_there = False
                self.counters.drop("device gone")
                break
            frame = self._view[LENGTH.size : LENGTH.size + length]
            peer = carrier.peers.get(bytes(frame[VNET_BYTES : VNET_BYTES + 6]))
            if peer is None or is_neighbours_talk(frame):
                self._nobody(carrier, frame)
                continue
            self.counters.frames += 1
            whole = LENGTH.size + length
            if sizes.get(peer, 0) + whole > space and peer in small:  # what came first goes first
                self._send(carrier.vni, peer, pack(small.pop(peer)), piece)
                sizes[peer] = 0
            if whole > space:
                LENGTH.pack_into(self._buffer, 0, length)
                self._send(carrier.vni, peer, self._view[:whole], piece)
            else:
                small.setdefault(peer, []).append(bytes(frame))
                sizes[peer] = sizes.get(peer, 0) + whole
        for peer, frames in small.items():
            self._send(carrier.vni, peer, pack(frames), piece)
        return is_there

    def _nobody(self, carrier: Carrier, frame: memoryview) -> None:
        """A frame that does not go to another node: questions are answered, the rest is dropped, never flooded."""
        reply = answer(frame, carrier.neighbours)
        if reply is not None:
            try:
                os.write(carrier.tap, reply)
            except OSError:
                self.counters.drop("device gone")
        elif not frame[VNET_BYTES] & _MULTICAST and not is_neighbours_talk(frame):
            self.counters.drop("nobody's address")

    def _send(self, vni: int, peer: Peer, content: bytes | memoryview, piece: int) -> None:
        sealer = peer.sealer
        if sealer is None:
            self.counters.drop("not agreed")
            return
        try:
            pieces = sealer.seal(vni, content, piece)
        except ValueError:
            self.counters.drop("too large")
            return
        target = (peer.address, self._port)
        try:
            self._send_pieces(pieces, piece, target)
        except OSError:
            self.counters.drop("not sent")
            return
        self.counters.units += 1

    def _send_pieces(self, pieces: list[bytes], piece: int, target: tuple[str, int]) -> None:
        if len(pieces) == 1:
            self._socket.sendto(pieces[0], target)
            return
        batch = min(_SEGMENTS_MAX, _SEGMENTED_BYTES_MAX // piece)
        control = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", piece))]
        for start in range(0, len(pieces), batch):
            several = pieces[start : start + batch]
            try:
                self._socket.sendmsg(several, control if len(several) > 1 else (), 0, target)
            except OSError as error:
                if error.errno not in _UNSEGMENTED:
                    raise
                for one in several:
                    self._socket.sendto(one, target)
