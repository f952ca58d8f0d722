"""Whether the network card computes wrong checksums inside VXLAN, decided from what arrives.  Pure.

A packet without a checksum arrives and one whose checksum is left to the card does not: then either the card is at
fault, or something on the way drops what has one.  Only the card is cured by computing checksums before it, so that is
tried, twice, with the card's own work in between.
"""

from collections.abc import Sequence

import msgspec

from skep.model.ids import NodeId

TRIALS = (False, True, False)
"""Whether checksums are left to the card, trial by trial."""


class Offload(msgspec.Struct, frozen=True):
    """``is_off``: it was found broken, for as long as this machine runs.

    ``in_vain``: peers on whose way packets with checksums are lost whoever computes them.
    """

    is_off: bool = False
    in_vain: frozenset[NodeId] = frozenset()


def is_suspect(offload: Offload, peer: NodeId, *, bare_arrives: bool, checked_arrives: bool) -> bool:
    """Whether the card is to be tried."""
    return bare_arrives and not checked_arrives and not offload.is_off and peer not in offload.in_vain


def after_trials(offload: Offload, peer: NodeId, arrived: Sequence[bool]) -> Offload:
    """What is known when of ``TRIALS``, or their beginning, these ``arrived``.

    A card that works in its trial was wrongly suspected: something was lost by chance.
    """
    if tuple(arrived) == tuple(not left_to_card for left_to_card in TRIALS):
        return msgspec.structs.replace(offload, is_off=True)
    if arrived and not arrived[0]:
        return msgspec.structs.replace(offload, in_vain=offload.in_vain | {peer})
    return offload


def after_success(offload: Offload, peer: NodeId) -> Offload:
    """Packets with checksums arrive at ``peer``: should they be lost once more, that is tried anew."""
    if peer not in offload.in_vain:
        return offload
    return msgspec.structs.replace(offload, in_vain=offload.in_vain - {peer})
