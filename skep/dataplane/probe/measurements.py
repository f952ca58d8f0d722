"""Derives the path MTU and the state of checksum offload from probes.  Pure.

A router between two nodes may have a smaller MTU than their devices, and often sends no error.  Packets of full size
are then dropped, and connections hang after their first small packets.  The MTU is therefore found by trying sizes.
A size is the size of a whole underlay packet, including the IP header.

If packets without a checksum arrive and packets whose checksum is left to the network card do not, there are two
explanations: the card computes wrong checksums, or something on the path drops packets with a checksum.  Only in the
first case, computing checksums in the kernel helps.  So that is tried twice, with the card's checksums in between.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from skep.dataplane.plan.probe import number_of
from skep.dataplane.probe.packets import PeerMeasurements
from skep.model.networks.paths import MTU_MIN
from skep.model.values.ids import NodeId

SIZES_AT_ONCE = 8
"""Sizes of one step.  They leave an eighth of the range, and are few enough not to fill a queue on the way."""


class Range(msgspec.Struct, frozen=True):
    """Bounds of a path's MTU.

    Packets of size ``arrives`` arrive (0 if none is known), and packets of size ``too_large`` do not.
    """

    arrives: int
    too_large: int


def initial_range(device_mtu: int) -> Range:
    """Return the range before any probe.  Only the MTU of the device limits it."""
    return Range(0, max(device_mtu, MTU_MIN) + 1)


def next_sizes(known: Range) -> tuple[int, ...]:
    """Return the sizes to try next, all at once, smallest first.

    Empty if the MTU is found, or if not even ``MTU_MIN`` arrives.  The two ends of the range come first, because
    usually packets of the device's full MTU arrive.  Then each step tries equally spaced sizes, which leaves an eighth
    of the range.
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

    A lost size counts as too large only if it is larger than all sizes that arrived.  Otherwise its loss was random.
    If not even ``MTU_MIN`` arrived, no larger size is tried.
    """
    arrives = max([known.arrives, *arrived])
    lost = [size for size in tried if size > arrives and size not in arrived]
    if not arrives:
        return Range(0, MTU_MIN)
    return Range(arrives, min([known.too_large, *lost]))


class Measurements(msgspec.Struct, frozen=True):
    """The path MTU to each peer that this node has measured (``own``), and the measurements that each of the ``peers``
    has sent.
    """

    own: Mapping[NodeId, int] = {}
    peers: Mapping[NodeId, PeerMeasurements] = msgspec.field(default={}, name="said")
    """The field is called ``said`` in the file of measurements."""


def path_mtu(measured: Measurements, nodes: Collection[NodeId], node: NodeId, device_mtu: int) -> int:
    """Return the size of the largest packet that arrives between any two of ``nodes``, as far as ``node``, one of them,
    knows.

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
    """Return the sizes to try if ``arrived_before`` arrived the last time: this size, and larger ones in case the path
    has changed.
    """
    return (arrived_before, *next_sizes(Range(arrived_before, device_mtu + 1)))


TRIALS = (False, True, False)
"""For each trial, whether checksums are left to the card."""


class Offload(msgspec.Struct, frozen=True):
    """State of the card's checksum offload.

    ``is_off`` is True if the card was found broken, and stays True until the machine is rebooted.  ``lost_anyway`` are
    peers that do not receive packets with checksums, whether the card or the kernel computes them.
    """

    is_off: bool = False
    lost_anyway: frozenset[NodeId] = frozenset()


def is_suspect(offload: Offload, peer: NodeId, *, bare_arrives: bool, checked_arrives: bool) -> bool:
    """Return whether the card must be tested: packets with checksums are lost, and packets without arrive."""
    return bare_arrives and not checked_arrives and not offload.is_off and peer not in offload.lost_anyway


def after_trials(offload: Offload, peer: NodeId, arrived: Sequence[bool]) -> Offload:
    """Return the state after ``TRIALS``, or after the first of them.

    ``arrived`` has, for each trial, whether its packets arrived.

    If packets arrived in the trial with the card's checksums, the suspicion was wrong and the earlier loss random.
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
