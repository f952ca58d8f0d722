"""Virtual addresses in real namespaces: who is reached, who is seen, what stays and what moves."""

import asyncio
import os
import signal
import socket
from collections import Counter

import pytest

from skep.model.tables import Table
from skep.node.supervision.supervisor import wait_end
from tests.names_lab import Conversation, NamesLab, net_process, shell, wait_until
from tests.tables import a_network, a_served

VIRTUAL = "10.0.1.2"
BACKENDS = {f"b{number}": f"10.0.1.{number}" for number in (11, 12, 13)}
CLIENT = "10.0.1.5"


def web(*names: str) -> Table:
    """Service web, served by these."""
    return a_network(a_served("web", VIRTUAL, [BACKENDS[name] for name in names]))


async def started(lab: NamesLab, *names: str) -> None:
    """A client that knows web's address, and all backends."""
    for id, address in BACKENDS.items():
        await lab.container(id, address)
        await lab.backend(id, address)
    await lab.container("client", CLIENT)
    await client_knows(lab, web(*names))


async def client_knows(lab: NamesLab, table: Table) -> None:
    lab.write(table)
    await lab.serve("client", table)
    assert await (await lab.resolver("client")).addresses("web") == [VIRTUAL]


async def flow(lab: NamesLab, address: str = VIRTUAL, id: str = "client") -> socket.socket:
    """A UDP socket of the container's, connected."""
    opened = await lab.open(id, socket.SOCK_DGRAM, socket.AF_INET6 if ":" in address else socket.AF_INET)
    opened.connect((address, 80))
    return opened


async def say(flow: socket.socket) -> list[str]:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(1):
        await loop.sock_sendall(flow, b"hello")
        return (await loop.sock_recv(flow, 100)).decode().split()


async def who(lab: NamesLab, count: int) -> Counter[str]:
    """Who answers that many new connections."""
    found: Counter[str] = Counter()
    for _ in range(count):
        conversation = await lab.connect("client", VIRTUAL)
        found[(await conversation.say())[0]] += 1
        conversation.socket.close()
    return found


async def test_connections_reach_all_that_serve_evenly_and_show_who_calls(lab: NamesLab) -> None:
    await started(lab, "b11", "b12", "b13")
    found: Counter[str] = Counter()
    for _ in range(600):
        opened = await flow(lab)
        name, seen, _ = await say(opened)
        opened.close()
        assert seen == CLIENT
        found[name] += 1
    assert set(found) == set(BACKENDS)
    assert max(found.values()) - min(found.values()) < 100, "five times the standard deviation is 58"
    assert set(await who(lab, 30)) == set(BACKENDS)
    assert (await (await lab.connect("client", VIRTUAL)).say())[1] == CLIENT


async def test_a_ping_is_answered(lab: NamesLab) -> None:
    await started(lab, "b11")
    ping = f"busybox ping -c 1 -W 2 {VIRTUAL}"
    assert "1 packets received" in await lab.namespaces.run(lab.paths.netns / "client", shell, ping)


async def test_a_backend_reaches_itself(lab: NamesLab) -> None:
    await started(lab, "b11")
    await lab.serve("b11", web("b11"))
    await (await lab.resolver("b11")).addresses("web")
    conversation = await lab.connect("b11", VIRTUAL)
    assert (await conversation.say())[:2] == ["b11", BACKENDS["b11"]]
    assert (await say(await flow(lab, id="b11")))[0] == "b11"


async def test_connections_stay_when_their_backend_stops_serving_and_new_ones_go_elsewhere(
    lab: NamesLab,
) -> None:
    await started(lab, "b11", "b12")
    open_now: list[tuple[Conversation, str]] = []
    for _ in range(10):
        conversation = await lab.connect("client", VIRTUAL)
        open_now.append((conversation, (await conversation.say())[0]))
    assert {name for _, name in open_now} == {"b11", "b12"}
    await lab.change(web("b12", "b13"))
    assert set(await who(lab, 20)) == {"b12", "b13"}
    await lab.change(web())
    for conversation, name in open_now:
        assert (await conversation.say())[0] == name


async def test_udp_flows_leave_a_backend_that_goes(lab: NamesLab) -> None:
    await started(lab, "b11")
    flows = [await flow(lab) for _ in range(5)]
    assert {(await say(one))[0] for one in flows} == {"b11"}
    await lab.change(web("b11", "b12", "b13"))
    assert {(await say(one))[0] for one in flows} == {"b11"}, "nobody moves who need not"
    await lab.change(web("b12"))
    assert {(await say(one))[0] for one in flows} == {"b12"}


async def test_udp_flows_leave_a_backend_that_went_while_the_process_was_away(lab: NamesLab) -> None:
    await started(lab, "b11")
    opened = await flow(lab)
    assert (await say(opened))[0] == "b11"
    crashed = net_process(lab.paths)
    os.kill(crashed.pid, signal.SIGKILL)
    await wait_end(crashed)
    lab.write(web("b12"))
    await lab.start_process()

    async def has_moved() -> bool:
        return (await say(opened))[0] == "b12"

    await wait_until(has_moved)


async def test_without_anybody_who_serves_connections_are_refused_at_once(lab: NamesLab) -> None:
    await started(lab)
    async with asyncio.timeout(0.5):
        with pytest.raises(ConnectionRefusedError):
            await lab.connect("client", VIRTUAL)
        with pytest.raises(PermissionError):  # what the kernel says when a packet is refused as it leaves
            await say(await flow(lab))
    await lab.change(web("b11"))
    assert set(await who(lab, 3)) == {"b11"}
    await lab.change(web())
    with pytest.raises(ConnectionRefusedError):
        await lab.connect("client", VIRTUAL)


async def test_both_families_have_virtual_addresses(lab: NamesLab) -> None:
    await lab.container("b11", "10.0.1.11", "fd00:1::11")
    await lab.backend("b11", "fd00:1::11")
    await lab.container("client", CLIENT, "fd00:1::5")
    table = a_network(a_served("web", [VIRTUAL, "fd00:1::2"], [("10.0.1.11", "fd00:1::11")]))
    lab.write(table)
    await lab.serve("client", table)
    assert await (await lab.resolver("client")).addresses("web", "AAAA") == ["fd00:1::2"]
    assert (await (await lab.connect("client", "fd00:1::2")).say())[:2] == ["b11", "fd00:1::5"]
    opened = await flow(lab, "fd00:1::2")
    assert (await say(opened))[0] == "b11"
    await lab.change(a_network(a_served("web", [VIRTUAL, "fd00:1::2"], [])))
    with pytest.raises(ConnectionRefusedError):
        await lab.connect("client", "fd00:1::2")


async def test_rules_lead_every_protocol(lab: NamesLab) -> None:
    """SCTP too, which this machine may not have."""
    await started(lab, "b11")
    rules = await lab.nft("client", "list table ip skep_virtual")
    assert "protocol" not in rules
    assert "dnat to ip daddr . numgen random mod 1 map @backends" in rules
    assert "l4proto" not in rules.split("chain spread_1")[1]


async def test_only_what_was_asked_for_is_loaded(lab: NamesLab) -> None:
    many = [a_served(f"s{number}", f"10.0.1.{number}", [f"10.0.2.{number}"]) for number in range(100, 150)]
    table = a_network(*many)
    lab.write(table)
    await lab.container("client", CLIENT)
    await lab.serve("client", table)
    assert "skep_virtual" not in await lab.nft("client", "list tables")
    resolver = await lab.resolver("client")
    await resolver.ask("s120")
    await resolver.ask("tasks.s121")
    loaded = await lab.nft("client", "list map ip skep_virtual services")
    assert "10.0.1.120" in loaded
    assert loaded.count("goto") == 1


# --- what is not forgotten ----------------------------------------------------------------------------------------


async def connections(lab: NamesLab) -> list[list[str]]:
    text = await lab.namespaces.run(lab.paths.netns / "client", shell, "cat /proc/net/nf_conntrack")
    return [line.split()[2:] for line in text.splitlines() if " tcp " in line and VIRTUAL in line]


async def test_idle_and_half_closed_connections_are_remembered(lab: NamesLab) -> None:
    await started(lab, "b11")
    conversation = await lab.connect("client", VIRTUAL)
    await conversation.say()
    ((_, _, seconds, state, *_),) = await connections(lab)
    assert state == "ESTABLISHED"
    assert int(seconds) > 1000
    values = await lab.namespaces.run(
        lab.paths.netns / "client",
        shell,
        "cd /proc/sys/net/netfilter; cat nf_conntrack_tcp_timeout_fin_wait nf_conntrack_tcp_timeout_close_wait",
    )
    assert min(map(int, values.split())) > 120


async def test_a_connection_that_is_forgotten_is_reset_not_silent(lab: NamesLab) -> None:
    """With times of a second in place of ours.  Nobody but the client's own namespace can have answered: its only
    backend still knows the connection."""
    await started(lab, "b11")
    client = lab.paths.netns / "client"
    conversation = await lab.connect("client", VIRTUAL)
    await conversation.say()
    short = "echo 1 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
    await lab.namespaces.run(client, shell, short)
    await conversation.say()

    async def is_forgotten() -> bool:
        return await connections(lab) == []

    await wait_until(is_forgotten, within_s=30)
    async with asyncio.timeout(1):
        with pytest.raises(ConnectionResetError):
            await conversation.say()


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_a_connection_idle_for_a_thousand_seconds_and_one_half_closed_for_two_minutes_go_on(
    lab: NamesLab,
) -> None:
    """In real time: here the time is what is tested."""
    await started(lab, "b11")
    idle = await lab.connect("client", VIRTUAL)
    await idle.say()
    begun = asyncio.get_running_loop().time()
    listening = await lab.open("b11", socket.SOCK_STREAM)
    listening.bind((BACKENDS["b11"], 81))
    listening.listen()
    half = await lab.connect("client", VIRTUAL, 81)
    loop = asyncio.get_running_loop()
    server, _ = await loop.sock_accept(listening)
    with server:
        half.socket.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(server, 1) == b""
        await asyncio.sleep(125)
        await loop.sock_sendall(server, b"late answer")
        async with asyncio.timeout(1):
            assert await loop.sock_recv(half.socket, 100) == b"late answer"
    await asyncio.sleep(1001 - (loop.time() - begun))
    assert (await idle.say())[0] == "b11"


# --- what somebody else does --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        "flush ruleset",
        "delete table ip skep_virtual; delete table ip skep_names",
        "delete element ip skep_virtual backends { 10.0.1.2 . 0 }",
        "flush chain ip skep_virtual out",
        "insert rule ip skep_virtual out drop",
        "flush chain ip skep_names out",
    ],
)
async def test_rules_that_somebody_changes_are_put_right(lab: NamesLab, harm: str) -> None:
    await started(lab, "b11")
    conversation = await lab.connect("client", VIRTUAL)
    await conversation.say()
    before = await lab.nft("client", "list ruleset")
    await lab.nft("client", harm)

    async def is_right() -> bool:
        return await lab.nft("client", "list ruleset") == before

    await wait_until(is_right)
    await eventually_repaired(lab, 1)
    assert set(await who(lab, 2)) == {"b11"}
    assert await (await lab.resolver("client")).addresses("web") == [VIRTUAL]
    assert (await conversation.say())[0] == "b11"


async def eventually_repaired(lab: NamesLab, times: int) -> None:
    async def is_counted() -> bool:
        return (await lab.client.listing()).repairs >= times

    await wait_until(is_counted)


async def test_tables_of_others_are_left_alone_and_our_own_changes_are_no_repairs(lab: NamesLab) -> None:
    await started(lab, "b11")
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
    await started(lab, "b11")
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
    rules = await lab.nft("client", "list ruleset")
    assert rules.count("goto spread_8") == 500
    await lab.nft("client", "flush ruleset")

    async def is_right() -> bool:
        return sorted(await lab.nft("client", "list ruleset")) == sorted(rules)

    await wait_until(is_right)
    await eventually_repaired(lab, 1)
    for number in range(0, 500, 100):
        await lab.change(a_network(*services[:number], *services[number + 1 :], subnets=["10.1.0.0/16"]))
    assert (await lab.client.listing()).repairs == 1, (
        "and it does not take its own repair for another's change"
    )


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
