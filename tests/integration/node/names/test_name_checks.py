"""Names as containers resolve them, compared with the store."""

import asyncio
from collections.abc import Mapping

from skep.aio.clock import SystemClock
from skep.dataplane.dns.checks import NameChecks
from skep.model.networks.paths import NetworkNames, PathCheck
from skep.model.networks.sandbox import Endpoint, EndpointConfig, Sandbox
from skep.model.networks.tables import NetworkHead
from tests.support.networks.names_lab import NamesLab
from tests.support.networks.tables import a_network, a_served

WEB = a_served("web", "10.0.1.2", ["10.0.1.3"], aliases=["www"])
SIX = a_served("six", ["10.0.1.9", "fd00:1::9"], ["10.0.1.8"])
FRONT = a_network(WEB, SIX)
SAID = {"web": ("10.0.1.2",), "www": ("10.0.1.2",), "six": ("10.0.1.9", "fd00:1::9")}


def a_sandbox(lab: NamesLab, id: str) -> Sandbox:
    place = Endpoint(
        config=EndpointConfig(head=FRONT.head, addresses=()), interface="eth0", port="p", mac_address=""
    )
    return Sandbox(netns=str(lab.paths.netns / id), endpoints=(place,))


def truth(names: Mapping[str, tuple[str, ...]], head: NetworkHead = FRONT.head) -> NetworkNames:
    return NetworkNames(network_id=head.id, network=head.name, names=names)


def checks(*running: Sandbox) -> NameChecks:
    return NameChecks(lambda: running, SystemClock())


async def served(lab: NamesLab) -> Sandbox:
    lab.write(FRONT)
    await lab.container("c1")
    await lab.serve("c1", FRONT)
    return a_sandbox(lab, "c1")


async def test_names_that_are_as_the_store_says_are_well(lab: NamesLab) -> None:
    (finding,) = await checks(await served(lab)).check([truth(SAID)])
    assert (finding.check, finding.port, finding.sent, finding.lost) == (PathCheck.NAMES, "53/udp", 3, 0)


async def test_a_name_with_a_wrong_address_is_reported(lab: NamesLab) -> None:
    container = await served(lab)
    (finding,) = await checks(container).check(
        [truth({**SAID, "web": ("10.0.1.77",), "gone": ("10.0.1.5",)})]
    )
    assert finding.is_failing
    assert finding.detail == (
        "on network front, gone is no address to containers here and 10.0.1.5 to the managers, and one more is wrong"
    )


async def test_what_changes_just_now_is_asked_again(lab: NamesLab) -> None:
    container = await served(lab)
    new = a_served("new", "10.0.1.50", ["10.0.1.51"])
    looking = asyncio.create_task(checks(container).check([truth({"new": ("10.0.1.50",)})]))
    await asyncio.sleep(0)
    await lab.change(a_network(WEB, new))
    (finding,) = await looking
    assert not finding.is_failing


async def test_a_container_without_a_name_server_is_reported_within_seconds(lab: NamesLab) -> None:
    await lab.container("c1")
    async with asyncio.timeout(10):
        (finding,) = await checks(a_sandbox(lab, "c1")).check([truth(SAID)])
    assert finding.is_failing


async def test_where_no_container_runs_there_is_nothing_to_ask(lab: NamesLab) -> None:
    container = await served(lab)
    assert await checks().check([truth(SAID)]) == ()
    assert await checks(container).check([truth({})]) == ()
    elsewhere = a_network(name="back").head
    assert await checks(container).check([truth(SAID, elsewhere)]) == ()
