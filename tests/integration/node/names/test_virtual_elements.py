"""Elements that are changed over a socket of our own are what nftables itself would have made of them."""

from pathlib import Path

import pytest

from skep.dataplane.netns.kernel import nft
from skep.dataplane.netns.kernel.namespaces import inside
from skep.dataplane.plan.vip import FAMILIES, NAME, VipBackends, VipPlan, noted, plan
from skep.dataplane.vip.elements import ElementSocket
from tests.support.networks.names_lab import NamesLab

MANY = tuple(f"10.0.{2 + number // 200}.{1 + number % 200}" for number in range(600))
"""More than one message takes."""
OLD: VipBackends = {
    "10.0.1.2": ("10.0.2.1", "10.0.2.2"),
    "10.0.1.3": ("10.0.2.3",),
    "10.0.1.4": (),
    "10.0.1.5": MANY,
    "fd00::2": ("fd00::11", "fd00::12"),
}
CHANGED: VipBackends = {
    "10.0.1.2": ("10.0.2.9",),
    "10.0.1.3": ("10.0.2.4", "10.0.2.3"),
    "10.0.1.4": ("10.0.2.5",),
    "10.0.1.6": tuple(reversed(MANY)),
    "fd00::2": ("fd00::11", "fd00::13"),
    "fd00::3": (),
}
"""With numbers of backends for which there are chains."""


async def two(lab: NamesLab) -> tuple[Path, Path]:
    """Namespaces with the rules of ``OLD``."""
    places = await lab.container("a"), await lab.container("b")
    for place in places:
        inside(place, lambda: nft.run(plan({}, OLD).text))
    return places


def listed() -> str:
    return "".join(nft.run(f"list table {family} {NAME}\n") for family in FAMILIES)


def change(planned: VipPlan) -> None:
    assert planned.elements is not None
    elements = ElementSocket()
    try:
        elements.change(planned.elements)
    finally:
        elements.close()


async def test_a_change_is_what_nftables_makes_of_it(lab: NamesLab) -> None:
    by_text, by_elements = await two(lab)
    there = plan({}, OLD).after
    for requested in (CHANGED, OLD):
        planned = plan(there, requested)
        inside(by_text, lambda planned=planned: nft.run(planned.text))  # type: ignore[misc]
        inside(by_elements, lambda planned=planned: change(planned))  # type: ignore[misc]
        assert inside(by_elements, listed) == inside(by_text, listed)
        there = planned.after


async def test_what_the_kernel_refuses_changes_nothing(lab: NamesLab) -> None:
    place, _ = await two(lab)
    nobody_knows = f"delete element ip {NAME} backends {{ 10.0.1.2 . 1 }}\n"
    inside(place, lambda: nft.run(nobody_knows))
    before = inside(place, listed)
    with pytest.raises(nft.NftFailed):
        inside(place, lambda: change(plan(plan({}, OLD).after, CHANGED)))
    assert inside(place, listed) == before


async def test_flows_that_were_noted_are_read(lab: NamesLab) -> None:
    place, _ = await two(lab)

    def read() -> list[frozenset[str]]:
        nft.run(noted(["10.0.1.2", "10.0.1.5", "fd00::2"]))
        elements = ElementSocket()
        try:
            return [elements.datagrams(family) for family in FAMILIES]
        finally:
            elements.close()

    assert inside(place, read) == [{"10.0.1.2", "10.0.1.5"}, {"fd00::2"}]
