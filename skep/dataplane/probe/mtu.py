"""Which packets to try to find the largest that arrives in one piece, and what overlays make of it.  Pure.

A router between two nodes may carry less than their devices say, and often sends no error: packets of full size
vanish, and connections hang after their first small packets.  So it is tried.  Sizes are those of the underlay's
packets, IP header included.
"""

from collections.abc import Collection, Mapping

import msgspec

from skep.dataplane.plan.probe import number_of
from skep.dataplane.probe.packets import Said
from skep.model.ids import NodeId
from skep.model.paths import MTU_MIN

SIZES_AT_ONCE = 8


class Range(msgspec.Struct, frozen=True):
    """What is known of one way: ``arrives`` does (0: nothing yet), ``too_large`` does not."""

    arrives: int
    too_large: int


def first_range(device_mtu: int) -> Range:
    """Nothing is known but that the device sends no more than its MTU."""
    return Range(0, max(device_mtu, MTU_MIN) + 1)


def sizes(known: Range) -> tuple[int, ...]:
    """The sizes to try next, all at once, smallest first; empty: the MTU is found, or there is none.

    The two ends come first, because the whole MTU of the devices is what mostly arrives.  Then the rest is cut into
    equal parts: each time an eighth of what was left stays.
    """
    least = known.arrives or MTU_MIN - 1
    inside = known.too_large - least - 1
    if inside <= 0:
        return ()
    if not known.arrives:
        return tuple(sorted({MTU_MIN, known.too_large - 1}))
    steps = min(inside, SIZES_AT_ONCE)
    return tuple(least + 1 + inside * (2 * step + 1) // (2 * steps) for step in range(steps))


def after(known: Range, tried: Collection[int], arrived: Collection[int]) -> Range:
    """What is known when of the ``tried`` sizes those that ``arrived`` did.

    What is larger than one that arrived and did not arrive itself is too large; what was lost below it was lost by
    chance.  Where not even ``MTU_MIN`` arrived, no larger one is tried.
    """
    arrives = max([known.arrives, *arrived])
    lost = [size for size in tried if size > arrives and size not in arrived]
    if not arrives:
        return Range(0, MTU_MIN)
    return Range(arrives, min([known.too_large, *lost]))


class Measured(msgspec.Struct, frozen=True):
    """``own``: what arrives of this node's packets, by peer; ``said``: what peers say of theirs."""

    own: Mapping[NodeId, int] = {}
    said: Mapping[NodeId, Said] = {}


def path_mtu(measured: Measured, nodes: Collection[NodeId], node: NodeId, device_mtu: int) -> int:
    """The largest packet that arrives between any two of ``nodes``, as far as ``node``, one of them, can tell.

    All of a network's nodes come to the same: each has what it measured itself, and receives from the others what they
    measured and which nodes are behind less.  What was not measured is taken to be as large as devices say.
    """
    numbers = {number_of(id) for id in nodes}
    found = [device_mtu]
    for id in nodes:
        if id == node:
            continue
        if measured.own.get(id, 0):
            found.append(measured.own[id])
        if id in measured.said:
            said = measured.said[id]
            found += [mtu for address, mtu in said.lower.items() if address in numbers]
            found += [said.mtu] if said.mtu else []
    return max(min(found), MTU_MIN)


def again(arrived_before: int, device_mtu: int) -> tuple[int, ...]:
    """What to try where ``arrived_before`` did: that, and some of what is larger, should the way have become better."""
    return (arrived_before, *sizes(Range(arrived_before, device_mtu + 1)))
