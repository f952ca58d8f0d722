"""What follows from probes that arrive or do not: the path MTU, and whether checksum offload works.  Pure.

A router between two nodes may have a smaller MTU than their devices, and often sends no error: packets of full size
are dropped, and connections hang after their first small packets.  So sizes are tried.  They are those of the
underlay's packets, IP header included.

A packet without a checksum arrives and one whose checksum is left to the network card does not: then either the card
computes wrong checksums, or something on the path drops packets that have one.  Computing checksums in the kernel
helps only against the card, so that is tried twice, with the card's checksums in between.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from skep.dataplane.plan.probe import number_of
from skep.dataplane.probe.packets import PeerMeasurements
from skep.model.ids import NodeId
from skep.model.paths import MTU_MIN

SIZES_AT_ONCE = 8


class Range(msgspec.Struct, frozen=True):
    """Bounds of one path's MTU: ``arrives`` does (0: nothing yet), ``too_large`` does not."""

    arrives: int
    too_large: int


def initial_range(device_mtu: int) -> Range:
    """Before any probe: only the device's MTU bounds it."""
    return Range(0, max(device_mtu, MTU_MIN) + 1)


def next_sizes(known: Range) -> tuple[int, ...]:
    """The sizes to try next, all at once, smallest first; empty: the MTU is found, or not even ``MTU_MIN`` arrives.

    The two ends come first, because mostly the devices' whole MTU arrives.  Then the rest is divided into equal parts:
    each step leaves an eighth of the range.
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
    """``known``, after of the ``tried`` sizes those in ``arrived`` did arrive.

    A size that was lost is too large only if it is larger than all that arrived; otherwise its loss was random.  Where
    not even ``MTU_MIN`` arrived, no larger one is tried.
    """
    arrives = max([known.arrives, *arrived])
    lost = [size for size in tried if size > arrives and size not in arrived]
    if not arrives:
        return Range(0, MTU_MIN)
    return Range(arrives, min([known.too_large, *lost]))


class Measurements(msgspec.Struct, frozen=True):
    """``own``: the path MTU to each peer; ``peers``: what each peer reports of its own measurements."""

    own: Mapping[NodeId, int] = {}
    peers: Mapping[NodeId, PeerMeasurements] = msgspec.field(default={}, name="said")
    """``said``: as the file of measurements names it."""


def path_mtu(measured: Measurements, nodes: Collection[NodeId], node: NodeId, device_mtu: int) -> int:
    """The largest packet that arrives between any two of ``nodes``, by the measurements of ``node``, one of them.

    All nodes of a network compute the same: each has its own measurements, and receives from the others their device's
    MTU and their smaller path MTUs.  Where nothing was measured, the device's MTU is assumed.
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
    """The sizes to try where ``arrived_before`` did: that one, and larger ones in case the path has changed."""
    return (arrived_before, *next_sizes(Range(arrived_before, device_mtu + 1)))


TRIALS = (False, True, False)
"""Whether checksums are left to the card, trial by trial."""


class Offload(msgspec.Struct, frozen=True):
    """State of the card's checksum offload.

    ``is_off``: the card was found broken, which holds until the machine is rebooted.  ``lost_anyway``: peers that
    packets with checksums do not reach, whether the card computes them or the kernel.
    """

    is_off: bool = False
    lost_anyway: frozenset[NodeId] = frozenset()


def is_suspect(offload: Offload, peer: NodeId, *, bare_arrives: bool, checked_arrives: bool) -> bool:
    """Whether the card is to be tested."""
    return bare_arrives and not checked_arrives and not offload.is_off and peer not in offload.lost_anyway


def after_trials(offload: Offload, peer: NodeId, arrived: Sequence[bool]) -> Offload:
    """``offload`` after ``TRIALS``, or the first of them, whose packets ``arrived`` or not.

    A card that works in its trial was wrongly suspected: the loss was random.
    """
    if tuple(arrived) == tuple(not by_card for by_card in TRIALS):
        return msgspec.structs.replace(offload, is_off=True)
    if arrived and not arrived[0]:
        return msgspec.structs.replace(offload, lost_anyway=offload.lost_anyway | {peer})
    return offload


def after_success(offload: Offload, peer: NodeId) -> Offload:
    """``offload`` after packets with checksums arrived at ``peer``: the next loss is tested again."""
    if peer not in offload.lost_anyway:
        return offload
    return msgspec.structs.replace(offload, lost_anyway=offload.lost_anyway - {peer})
