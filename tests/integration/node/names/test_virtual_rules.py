"""The rules of virtual addresses are kept, whichever process changes or writes them."""

import asyncio
import os
import re
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest

from skep.dataplane.netns.nft_table import whole
from skep.dataplane.plan.vip import vip_table
from skep.errors import Unavailable
from skep.node.supervision.supervisor import wait_end
from tests.support.networks.names_lab import NamesLab, net_process, wait_until
from tests.support.networks.tables import a_network, a_served
from tests.support.networks.virtual_lab import BACKENDS, CLIENT, VIRTUAL, client_has, start_web, web, who


async def test_rules_that_are_left_from_a_crash_are_replaced(lab: NamesLab) -> None:
    """One that came before anything was written down."""
    for id, address in BACKENDS.items():
        await lab.container(id, address)
        await lab.backend(id, address)
    await lab.container("client", CLIENT)
    await lab.nft("client", whole(vip_table("ip", {VIRTUAL: (BACKENDS["b13"],)})))
    await lab.nft("client", "add table ip skep_names; add chain ip skep_names out")
    await client_has(lab, web("b11"))
    assert set(await who(lab, 3)) == {"b11"}


async def test_serving_and_forgetting_leaves_nothing_behind(lab: NamesLab) -> None:
    await start_web(lab, "b11")
    path = Path(f"/proc/{net_process(lab.paths).pid}/fd")
    table = web("b11", "b12")
    counts = []
    for turn in range(20):
        await lab.container("other", "10.0.1.6")
        await lab.serve("other", table)
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            resolver = await lab.resolver("other", kind)
            await resolver.ask("web")
            resolver.socket.close()
        await lab.client.forget("other")
        await lab.namespaces.destroy("other")
        if turn in (1, 19):
            await wait_until(lambda: _has_settled(path, counts))
    assert counts[0] == counts[1]
    assert [one.name for one in lab.paths.names.iterdir()] == ["client"]


async def _has_settled(path: Path, counts: list[int]) -> bool:
    """Whether the number of descriptors stays; it is noted then."""
    before = len(list(path.iterdir()))
    await asyncio.sleep(0.1)  # connections that were closed are noticed
    if len(list(path.iterdir())) != before:
        return False
    counts.append(before)
    return True


# --- foreign changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        "flush ruleset",
        "delete table ip skep_virtual; delete table ip skep_names",
        "delete element ip skep_virtual backends { 10.0.1.2 . 0 }",
        "flush chain ip skep_virtual out",
        "insert rule ip skep_virtual out drop",
        "flush chain ip skep_names out",
        "delete table ip skep_asked",
    ],
)
async def test_foreign_changes_of_rules_are_repaired(lab: NamesLab, harm: str) -> None:
    await start_web(lab, "b11")
    conversation = await lab.connect("client", VIRTUAL)
    await conversation.say()
    before = await rules_of(lab)
    await lab.nft("client", harm)

    async def is_right() -> bool:
        return await rules_of(lab) == before

    await wait_until(is_right)
    await eventually_repaired(lab, 1)
    assert set(await who(lab, 2)) == {"b11"}
    assert await (await lab.resolver("client")).addresses("web") == [VIRTUAL]
    assert (await conversation.say())[0] == "b11"


async def rules_of(lab: NamesLab) -> list[str]:
    """All rules of the client, without what the kernel notes in them for half a minute."""
    listed = await lab.nft("client", "list ruleset")
    lines = re.sub(r"elements = \{[^}]*expires[^}]*\}", "", listed).splitlines()
    return sorted(line.strip() for line in lines if line.strip())


async def eventually_repaired(lab: NamesLab, times: int) -> None:
    async def is_counted() -> bool:
        return (await lab.client.listing()).repairs >= times

    await wait_until(is_counted)


async def test_tables_of_others_are_left_alone_and_our_own_changes_are_no_repairs(lab: NamesLab) -> None:
    await start_web(lab, "b11")
    others = "table ip mine { chain out { type filter hook output priority 0; counter; }; }"
    await lab.nft("client", f"add {others}")
    theirs = await lab.nft("client", "list table ip mine")
    for names in (("b11", "b12"), ("b12",), ("b12", "b13")):
        await lab.change(web(*names))
    await lab.nft("client", "delete table ip skep_names")
    await eventually_repaired(lab, 1)
    kept = await lab.nft("client", "list table ip mine")
    assert [line for line in kept.splitlines() if "counter" not in line] == [
        line for line in theirs.splitlines() if "counter" not in line
    ]
    assert (await lab.client.listing()).repairs == 1


# --- the next process ---------------------------------------------------------------------------------------------


async def test_the_next_process_goes_on_with_what_was_loaded(lab: NamesLab) -> None:
    await start_web(lab, "b11")
    conversation = await lab.connect("client", VIRTUAL)
    await conversation.say()
    await lab.replace_process()
    await lab.change(web("b12"))
    assert set(await who(lab, 3)) == {"b12"}
    crashed = net_process(lab.paths)
    os.kill(crashed.pid, signal.SIGKILL)
    await wait_end(crashed)
    assert set(await who(lab, 3)) == {"b12"}, "rules need no process"
    lab.write(web("b13"))
    await lab.start_process()

    async def has_moved() -> bool:
        return set(await who(lab, 1)) == {"b13"}

    await wait_until(has_moved)
    assert (await conversation.say())[0] == "b11"
    assert (await lab.client.listing()).repairs == 0


async def test_five_hundred_services_are_loaded_and_repaired_whole(lab: NamesLab) -> None:
    """More than fits into one message of the kernel's."""
    services = [
        a_served(
            f"s{number}",
            f"10.1.{number // 200}.{1 + number % 200}",
            [f"10.2.0.{task}" for task in range(1, 9)],
        )
        for number in range(500)
    ]
    table = a_network(*services, subnets=["10.1.0.0/16"])
    lab.write(table)
    await lab.container("client", CLIENT)
    await lab.serve("client", table)
    resolver = await lab.resolver("client")
    for number in range(500):
        assert (await resolver.ask(f"s{number}")).rr
    rules = await rules_of(lab)
    assert "".join(rules).count("goto spread_8") == 500
    await lab.nft("client", "flush ruleset")

    async def is_right() -> bool:
        return await rules_of(lab) == rules

    await wait_until(is_right)
    await eventually_repaired(lab, 1)
    for number in range(0, 500, 100):
        await lab.change(a_network(*services[:number], *services[number + 1 :], subnets=["10.1.0.0/16"]))
    assert (await lab.client.listing()).repairs == 1, (
        "and it does not take its own repair for another's change"
    )


async def test_a_container_that_is_gone_holds_no_change_up(lab: NamesLab) -> None:
    await start_web(lab, "b11")
    await lab.container("other", "10.0.1.6")
    await lab.serve("other", web("b11"))
    await (await lab.resolver("other")).ask("web")
    await lab.namespaces.destroy("other")
    await lab.change(web("b12"))
    assert set(await who(lab, 3)) == {"b12"}


async def test_changes_reach_many_namespaces_together(lab: NamesLab) -> None:
    table = web("b11")
    lab.write(table)
    for number in range(40):
        await lab.container(f"c{number}")
        await lab.serve(f"c{number}", table)
        await (await lab.resolver(f"c{number}")).addresses("web")
    await lab.change(web("b12", "b13"))
    for number in range(40):
        rules = await lab.nft(f"c{number}", "list map ip skep_virtual backends")
        assert BACKENDS["b11"] not in rules
        assert BACKENDS["b12"] in rules


async def test_a_container_that_has_the_table_to_itself_fails_changes_of_its_own_networks_alone(
    lab: NamesLab,
) -> None:
    await start_web(lab, "b11")
    back = a_network(a_served("api", "10.0.2.2", ["10.0.2.3"]), name="back")
    lab.write(back)
    await lab.container("other")
    await lab.serve("other", back)
    assert await (await lab.resolver("other")).addresses("api") == ["10.0.2.2"]
    owner = await lab.namespaces.run(
        lab.paths.netns / "client", partial(subprocess.Popen, ["nft", "-i"], stdin=subprocess.PIPE)
    )
    try:
        assert owner.stdin is not None
        owner.stdin.write(b"delete table ip skep_virtual; add table ip skep_virtual { flags owner; }\n")
        owner.stdin.flush()

        async def is_owned() -> bool:
            return "owner" in await lab.nft("client", "list ruleset")

        await wait_until(is_owned)
        with pytest.raises(Unavailable, match="1 of 1 containers do not have the new virtual addresses yet"):
            await lab.change(web("b12"))
        for number in range(4, 24):  # each at another moment of the attempts to write the other one
            await lab.change(a_network(a_served("api", "10.0.2.2", [f"10.0.2.{number}"]), name="back"))
            assert f"10.0.2.{number}" in await lab.nft("other", "list map ip skep_virtual backends")
    finally:
        owner.kill()
        owner.wait()

    async def is_led_again() -> bool:
        return BACKENDS["b12"] in await lab.nft("client", "list ruleset")

    await wait_until(is_led_again, within_s=15)
