"""Virtual addresses in real namespaces: who is reached, who is seen, what stays and what moves."""

import asyncio
import os
import signal
import socket
from collections import Counter

import pytest
from msgspec.structs import replace

from skep.dataplane.netns.kernel import conntrack
from skep.model.networks.tables import TableSplit
from skep.node.supervision.supervisor import wait_end
from tests.support.networks.names_lab import Conversation, NamesLab, net_process, shell, wait_until
from tests.support.networks.tables import a_network, a_served
from tests.support.networks.virtual_lab import BACKENDS, CLIENT, VIRTUAL, flow, say, start_web, web, who


async def test_connections_are_spread_evenly_and_keep_the_source_address(lab: NamesLab) -> None:
    await start_web(lab, "b11", "b12", "b13")
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


async def test_new_tasks_of_a_staged_update_get_their_share_of_the_connections(lab: NamesLab) -> None:
    await start_web(lab, "b11", "b12", "b13")
    table = web("b11", "b12", "b13")
    (service,), newest = table.services.values(), list(table.endpoints.values())[-1]
    endpoints = {**table.endpoints, newest.task_id: replace(newest, version=2)}
    for percent in (5, 40, 0, 100):
        split = replace(service, split=TableSplit(percent, (2,)))
        await lab.change(replace(table, endpoints=endpoints, services={service.id: split}))
        found: Counter[str] = Counter()
        for _ in range(500):
            opened = await flow(lab)
            found[(await say(opened))[0]] += 1
            opened.close()
        assert abs(found["b13"] / 5 - percent) <= (11 if percent % 100 else 0), "five times the deviation"
        if percent == 5:
            assert 0 < found["b13"] < 60


async def test_a_ping_is_answered(lab: NamesLab) -> None:
    await start_web(lab, "b11")
    ping = f"busybox ping -c 1 -W 2 {VIRTUAL}"
    assert "1 packets received" in await lab.namespaces.run(lab.paths.netns / "client", shell, ping)


async def test_a_backend_reaches_itself(lab: NamesLab) -> None:
    await start_web(lab, "b11")
    await lab.serve("b11", web("b11"))
    await (await lab.resolver("b11")).addresses("web")
    conversation = await lab.connect("b11", VIRTUAL)
    assert (await conversation.say())[:2] == ["b11", BACKENDS["b11"]]
    assert (await say(await flow(lab, id="b11")))[0] == "b11"


async def test_connections_stay_when_their_backend_stops_serving_and_new_ones_go_elsewhere(
    lab: NamesLab,
) -> None:
    await start_web(lab, "b11", "b12")
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


async def test_connections_that_a_lost_backend_does_not_accept_go_elsewhere(lab: NamesLab) -> None:
    """Otherwise the client would repeat its request to the lost backend for two minutes."""
    await start_web(lab, "b11")
    accepted = await lab.connect("client", VIRTUAL)
    await lab.nft("b11", "add table ip lost; add chain ip lost in { type filter hook input priority 0; }")
    await lab.nft("b11", "add rule ip lost in tcp flags & (syn | ack) == syn drop")
    waiting = asyncio.create_task(lab.connect("client", VIRTUAL))

    async def is_sent() -> bool:
        found = await lab.namespaces.run(lab.paths.netns / "client", unanswered)
        return VIRTUAL in found

    await wait_until(is_sent)
    await lab.change(web("b12"))
    async with asyncio.timeout(10):
        assert (await (await waiting).say())[0] == "b12"
    assert (await accepted.say())[0] == "b11", "an accepted connection stays"


def unanswered() -> list[str]:
    """Destinations of TCP connections in this namespace that nobody has accepted."""
    with conntrack.opened(5) as connection:
        found = list(conntrack.flows(connection, socket.AF_INET))
    return [one.original.destination for one in found if not one.is_answered]


async def test_udp_flows_leave_a_backend_that_goes(lab: NamesLab) -> None:
    await start_web(lab, "b11")
    flows = [await flow(lab) for _ in range(5)]
    assert {(await say(one))[0] for one in flows} == {"b11"}
    await lab.change(web("b11", "b12", "b13"))
    assert {(await say(one))[0] for one in flows} == {"b11"}, "no other connection moves"
    await lab.change(web("b12"))
    assert {(await say(one))[0] for one in flows} == {"b12"}


async def test_udp_flows_leave_a_backend_that_went_while_the_process_was_away(lab: NamesLab) -> None:
    await start_web(lab, "b11")
    opened = await flow(lab)
    assert (await say(opened))[0] == "b11"
    crashed = net_process(lab.paths)
    os.kill(crashed.pid, signal.SIGKILL)
    await wait_end(crashed)
    lab.write(web("b12"))
    await lab.start_process()

    async def has_moved() -> bool:
        try:
            return (await say(opened))[0] == "b12"
        except TimeoutError:  # b11 is not there any more
            return False

    await wait_until(has_moved)


async def test_without_backends_connections_are_refused_at_once(lab: NamesLab) -> None:
    await start_web(lab)
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
    await start_web(lab, "b11")
    rules = await lab.nft("client", "list table ip skep_virtual")
    assert "protocol" not in rules
    assert "dnat to ip daddr . numgen random mod 1 map @backends" in rules
    assert "l4proto" not in rules.split("chain spread_1")[1]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_an_address_that_was_never_asked_for_is_led_when_it_is_used(
    lab: NamesLab, kind: socket.SocketKind
) -> None:
    """A proxy, say, that has it from the API."""
    await lab.container("b11", BACKENDS["b11"])
    await lab.backend("b11", BACKENDS["b11"])
    await lab.container("client", CLIENT)
    table = web("b11")
    lab.write(table)
    await lab.serve("client", table)
    if kind == socket.SOCK_STREAM:
        assert (await (await lab.connect("client", VIRTUAL)).say())[0] == "b11", "the second attempt of TCP"
    else:
        opened = await flow(lab)

        async def is_led() -> bool:
            try:
                return (await say(opened))[0] == "b11"
            except TimeoutError:
                return False

        await wait_until(is_led)
    assert (await (await lab.connect("client", VIRTUAL)).say())[0] == "b11"


async def test_addresses_of_a_further_subnet_are_led_too(lab: NamesLab) -> None:
    await lab.container("b11", BACKENDS["b11"])
    await lab.backend("b11", BACKENDS["b11"])
    client = await lab.container("client", CLIENT)
    lab.write(web("b11"))
    await lab.serve("client", web("b11"))
    further = "10.0.9.2"
    await lab.namespaces.run(client, shell, "ip route add 10.0.9.0/24 dev eth0")
    both = ("10.0.1.0/24", "10.0.9.0/24")
    await lab.change(a_network(a_served("web", further, [BACKENDS["b11"]]), subnets=both))

    async def is_told() -> bool:
        return "10.0.9.0/24" in await lab.nft("client", "list ruleset")

    await wait_until(is_told)
    assert (await (await lab.connect("client", further)).say())[0] == "b11"


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
    await start_web(lab, "b11")
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
    """With times of a second in place of ours.  Only the client's own namespace can have answered: its only
    backend still knows the connection."""
    await start_web(lab, "b11")
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
    await start_web(lab, "b11")
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
