"""Derives the path MTU and the state of checksum offload from probes.  Pure.

A router between two nodes may have a smaller MTU than their devices, and often sends no error.  Packets of full size
are then dropped, and connections hang after their first small packets.  The MTU is therefore found by trying sizes.
Sizes count whole underlay packets, including the IP header.

If packets without a checksum arrive and packets whose checksum is left to the network card do not, there are two
explanations: the card computes wrong checksums, or something on the path drops packets with a checksum.  Computing
checksums in the kernel helps only in the first case, so that is tried twice, with the card's checksums in between.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from skep.dataplane.plan.probe import number_of
from skep.dataplane.probe.packets import PeerMeasurements
from skep.model.ids import NodeId
from skep.model.paths import MTU_MIN

SIZES_AT_ONCE = 8


class Range(msgspec.Struct, frozen=True):
    """Bounds of a path's MTU.  Packets of size ``arrives`` arrive (0 if none has), packets of ``too_large`` do not."""

    arrives: int
    too_large: int


def initial_range(device_mtu: int) -> Range:
    """Return the range before any probe, which only the device's MTU limits."""
    return Range(0, max(device_mtu, MTU_MIN) + 1)


def next_sizes(known: Range) -> tuple[int, ...]:
    """Return the sizes to try next, all at once, smallest first.

    Empty if the MTU is found, or if not even ``MTU_MIN`` arrives.  The two ends come first, because usually the
    devices' whole MTU arrives.  Then the rest is divided into equal parts, so that each step leaves an eighth of the
    range.
    """
    least = known.arrives or MTU_MIN - 1
    inside = known.too_large - least - 1
    if inside <= 0:
        return ()
    if not known.arrives:
        return tuple(sorted({MTU_MIN, known.too_large - 1}))
    steps = min(inside, SIZES_AT_ONCE)
    return tuple(least + 1 + inside * (2 * step + 1) // (2 * steps) for step in range(steps))


def narrowed(known: Range, tried: Collection[int], arrived: Collection[int]) -> Range:
    """Return the range after the ``tried`` sizes, of which ``arrived`` did arrive.

    A lost size is too large only if it is larger than all that arrived.  Otherwise its loss was random.  If not even
    ``MTU_MIN`` arrived, no larger one is tried.
    """
    arrives = max([known.arrives, *arrived])
    lost = [size for size in tried if size > arrives and size not in arrived]
    if not arrives:
        return Range(0, MTU_MIN)
    return Range(arrives, min([known.too_large, *lost]))


class Measurements(msgspec.Struct, frozen=True):
    """The ``own`` path MTU to each peer, and each of the ``peers``' reports of its own measurements."""

    own: Mapping[NodeId, int] = {}
    peers: Mapping[NodeId, PeerMeasurements] = msgspec.field(default={}, name="said")
    """``said`` is its name in the file of measurements."""


def path_mtu(measured: Measurements, nodes: Collection[NodeId], node: NodeId, device_mtu: int) -> int:
    """Return the largest packet that arrives between any two of ``nodes``, measured by ``node``, which is among them.

    All nodes of a network compute the same: each has its own measurements, and receives the others' device MTU and
    smaller path MTUs.  Without a measurement, the device's MTU is assumed.
    """
    numbers = {number_of(id) for id in nodes}
    found = [device_mtu]
    for id in nodes:
        if id == node:
            continue
        if measured.own.get(id, 0):
            found.append(measured.own[id])
        if id in measured.peers:
            reported = measured.peers[id]
            found += [mtu for address, mtu in reported.lower.items() if address in numbers]
            found += [reported.mtu] if reported.mtu else []
    return max(min(found), MTU_MIN)


def recheck_sizes(arrived_before: int, device_mtu: int) -> tuple[int, ...]:
    """Return the sizes to try after ``arrived_before`` arrived: the same, and larger ones for a changed path."""
    return (arrived_before, *next_sizes(Range(arrived_before, device_mtu + 1)))


TRIALS = (False, True, False)
"""Whether checksums are left to the card, trial by trial."""


class Offload(msgspec.Struct, frozen=True):
    """State of the card's checksum offload.

    ``is_off`` if the card was found broken, which holds until the machine is rebooted.  ``lost_anyway`` are peers that
    do not receive packets with checksums, whether the card or the kernel computes them.
    """

    is_off: bool = False
    lost_anyway: frozenset[NodeId] = frozenset()


def is_suspect(offload: Offload, peer: NodeId, *, bare_arrives: bool, checked_arrives: bool) -> bool:
    """Return whether to test the card."""
    return bare_arrives and not checked_arrives and not offload.is_off and peer not in offload.lost_anyway


def after_trials(offload: Offload, peer: NodeId, arrived: Sequence[bool]) -> Offload:
    """Return the state after ``TRIALS``, or after the first of them, from whether their packets ``arrived``.

    A card that works in its trial was wrongly suspected: the loss was random.
    """
    if tuple(arrived) == tuple(not by_card for by_card in TRIALS):
        return msgspec.structs.replace(offload, is_off=True)
    if arrived and not arrived[0]:
        return msgspec.structs.replace(offload, lost_anyway=offload.lost_anyway | {peer})
    return offload


def after_success(offload: Offload, peer: NodeId) -> Offload:
    """Return the state after packets with checksums arrived at ``peer``, so that the next loss is tested again."""
    if peer not in offload.lost_anyway:
        return offload
    return msgspec.structs.replace(offload, lost_anyway=offload.lost_anyway - {peer})
