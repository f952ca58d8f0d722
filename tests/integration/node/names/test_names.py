"""Names at 127.0.0.11, as an independent DNS client in a container's namespace sees them."""

import asyncio
import random
import socket
import struct
from contextlib import suppress

import msgspec
import pytest
from dnslib import RCODE, DNSHeader, DNSQuestion, DNSRecord

from skep.dataplane.net_process.protocol import ContainerEndpoint, Named, NameServer
from skep.errors import FailedPrecondition
from tests.support.networks.names_lab import NamesLab, net_process, shell, wait_until
from tests.support.networks.tables import a_network, a_served
from tests.support.networks.upstream import fails, knows, upstream

WEB = a_served("web", "10.0.1.2", ["10.0.1.3", "10.0.1.4"], aliases=["www"])
FRONT = a_network(WEB)


async def served(lab: NamesLab, *servers: NameServer, id: str = "c1") -> None:
    lab.write(FRONT)
    await lab.container(id)
    await lab.serve(id, FRONT, servers=servers)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
async def test_services_tasks_and_addresses_are_found(lab: NamesLab, kind: socket.SocketKind) -> None:
    await served(lab)
    resolver = await lab.resolver("c1", kind)
    assert await resolver.addresses("WEB") == ["10.0.1.2"]
    assert await resolver.addresses("www.front") == ["10.0.1.2"]
    assert sorted(await resolver.addresses("tasks.web")) == ["10.0.1.3", "10.0.1.4"]
    assert await resolver.addresses("2.web") == ["10.0.1.4"]
    assert await resolver.addresses("web", "AAAA") == []
    assert await resolver.addresses("3.1.0.10.in-addr.arpa", "PTR") == ["web.1.t1.front."]
    assert await resolver.addresses("_80._tcp.web", "SRV") != []


async def test_answers_follow_the_table(lab: NamesLab) -> None:
    await served(lab)
    resolver = await lab.resolver("c1")
    for turn in range(100):
        is_there = turn % 2 == 0
        new = a_served("new", f"10.0.1.{100 + turn}", ["10.0.1.9"])
        await lab.change(a_network(WEB, *[new][: int(is_there)]))
        answer = await resolver.ask("new")
        found = [str(record.rdata) for record in answer.rr]
        assert (found, answer.header.rcode) == (
            ([f"10.0.1.{100 + turn}"], 0) if is_there else ([], RCODE.NXDOMAIN)
        )


async def test_a_wrong_name_is_answered_at_once(lab: NamesLab) -> None:
    await served(lab)
    resolver = await lab.resolver("c1")
    async with asyncio.timeout(0.5):
        for name in ("wbe", "9.web"):
            assert (await resolver.ask(name)).header.rcode == RCODE.NXDOMAIN
        assert (await resolver.ask("99.1.0.10.in-addr.arpa", "PTR")).header.rcode == RCODE.NXDOMAIN
        assert (await resolver.ask("example.com")).header.rcode == RCODE.SERVFAIL, (
            "there is no upstream server"
        )


async def test_a_wrong_name_does_not_wait_for_servers_that_are_away(lab: NamesLab) -> None:
    async with upstream(lambda _: None) as silent:
        await served(lab, silent)
        resolver = await lab.resolver("c1")
        async with asyncio.timeout(1.5):
            assert (await resolver.ask("wbe")).header.rcode == RCODE.NXDOMAIN
        async with asyncio.timeout(0.3):
            assert (await resolver.ask("ewb")).header.rcode == RCODE.NXDOMAIN, "it is known to be away by now"
        async with asyncio.timeout(0.3):
            assert await resolver.addresses("web") == ["10.0.1.2"]


async def test_other_names_are_asked_elsewhere(lab: NamesLab) -> None:
    async with (
        upstream(fails("SERVFAIL")) as broken,
        upstream(fails("REFUSED")) as refusing,
        upstream(knows("192.0.2.7")) as there,
    ):
        await served(lab, broken, refusing, there)
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            resolver = await lab.resolver("c1", kind)
            assert await resolver.addresses("example.com") == ["192.0.2.7"]
            assert await resolver.addresses("printer") == ["192.0.2.7"], "the node's network may know it"
            assert await resolver.addresses("web") == ["10.0.1.2"], "ours comes first"


async def test_the_next_server_is_asked_when_one_says_nothing(lab: NamesLab) -> None:
    async with upstream(lambda _: None) as silent, upstream(knows("192.0.2.7")) as there:
        await served(lab, silent, there)
        resolver = await lab.resolver("c1")
        assert await resolver.addresses("example.com") == ["192.0.2.7"]
        async with asyncio.timeout(0.5):
            assert await resolver.addresses("example.com") == ["192.0.2.7"], "it is asked last from now on"


async def test_without_an_answer_from_upstream_servfail_precedes_the_retry_of_the_client(
    lab: NamesLab,
) -> None:
    async with upstream(lambda _: None) as silent:
        await served(lab, silent)
        answer = await (await lab.resolver("c1")).ask("example.com")
        assert answer.header.rcode == RCODE.SERVFAIL


async def test_false_answers_are_not_believed(lab: NamesLab) -> None:
    def liar(question: DNSRecord) -> bytes:
        said = DNSRecord.parse(knows("203.0.113.66")(question))
        said.header.id ^= 1
        return said.pack()

    def other(question: DNSRecord) -> bytes:
        return knows("203.0.113.66")(
            DNSRecord(DNSHeader(id=question.header.id), q=DNSQuestion("other.example"))
        )

    async with upstream(liar) as first, upstream(other) as second, upstream(knows("192.0.2.7")) as third:
        await served(lab, first, second, third)
        assert await (await lab.resolver("c1")).addresses("example.com") == ["192.0.2.7"]


async def test_ids_and_ports_of_questions_differ(lab: NamesLab) -> None:
    asked: list[int] = []

    def noted(question: DNSRecord) -> bytes:
        asked.append(question.header.id)
        return knows("192.0.2.7")(question)

    async with upstream(noted) as there:
        await served(lab, there)
        resolver = await lab.resolver("c1")
        for _ in range(20):
            await resolver.ask("example.com")
    assert len(set(asked)) > 15
    assert max(asked) - min(asked) > 1000


async def test_what_is_too_long_for_udp_comes_over_tcp(lab: NamesLab) -> None:
    many = a_network(
        a_served("many", (), [f"10.0.{2 + number // 200}.{1 + number % 200}" for number in range(400)])
    )
    async with upstream(knows("192.0.2.7", count=300)) as there:
        lab.write(many)
        await lab.container("c1")
        await lab.serve("c1", many, servers=[there])
        for name, whole in (("many", 400), ("example.com", 300)):
            datagrams = await lab.resolver("c1")
            small = await datagrams.ask(name)
            assert small.header.tc == 1
            assert len(small.pack()) <= 512
            assert len((await datagrams.ask(name, udp_bytes_max=1232)).rr) < whole
            assert len((await (await lab.resolver("c1", socket.SOCK_STREAM)).ask(name)).rr) == whole


async def test_with_ndots_set_clients_are_left_to_their_search_domains(lab: NamesLab) -> None:
    lab.write(FRONT)
    await lab.container("c1")
    async with upstream(knows("192.0.2.7")) as there:
        await lab.serve("c1", FRONT, servers=[there], single_labels=False)
        resolver = await lab.resolver("c1")
        assert await resolver.addresses("printer") == []
        assert await resolver.addresses("printer.example") == ["192.0.2.7"]


async def test_names_of_a_container_without_a_default_route_are_not_forwarded(lab: NamesLab) -> None:
    lab.write(FRONT)
    path = await lab.container("c1")
    asked: list[DNSRecord] = []

    def noted(question: DNSRecord) -> bytes:
        asked.append(question)
        return knows("192.0.2.7")(question)

    async with upstream(noted) as there:
        places = (ContainerEndpoint(FRONT.head.id),)
        named = Named(id="c1", netns=str(path), networks=places, servers=(there,), forwards=False)
        await lab.client.serve(named)
        resolver = await lab.resolver("c1")
        assert (await resolver.ask("example.com")).header.rcode == RCODE.SERVFAIL
        assert (await resolver.ask("printer")).header.rcode == RCODE.NXDOMAIN
        assert asked == []
        await lab.client.serve(msgspec.structs.replace(named, forwards=True))
        assert await resolver.addresses("example.com") == ["192.0.2.7"], "it got one"


@pytest.mark.parametrize("comes_later", [False, True])
async def test_a_server_on_the_containers_own_network_is_asked_from_there(
    lab: NamesLab, comes_later: bool
) -> None:
    """``comes_later``: the subnet, after names are served."""
    lab.write(a_network(WEB, subnets=["10.0.8.0/24"]) if comes_later else FRONT)
    await lab.container("c1", "10.0.1.3")
    await lab.container("dns", "10.0.1.4")

    def bound() -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind(("10.0.1.4", 53))
        return opened

    with await lab.namespaces.run(lab.paths.netns / "dns", bound) as server:
        server.setblocking(False)
        await lab.serve("c1", FRONT, servers=[NameServer("10.0.1.4")])
        if comes_later:
            await lab.change(FRONT)

            async def is_known() -> bool:
                return "10.0.1.0/24" in await lab.nft("c1", "list ruleset")

            await wait_until(is_known)
        resolver = await lab.resolver("c1")

        async def answer_once() -> None:
            loop = asyncio.get_running_loop()
            data, client = await loop.sock_recvfrom(server, 512)
            await loop.sock_sendto(server, knows("192.0.2.7")(DNSRecord.parse(data)), client)

        async with asyncio.TaskGroup() as group:
            group.create_task(answer_once())
            assert await resolver.addresses("example.com") == ["192.0.2.7"]


async def test_a_container_may_have_a_name_server_of_its_own(lab: NamesLab) -> None:
    await served(lab)

    def own() -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind(("0.0.0.0", 53))
        return opened

    with await lab.namespaces.run(lab.paths.netns / "c1", own):
        assert await (await lab.resolver("c1")).addresses("web") == ["10.0.1.2"]


async def test_queries_from_outside_the_namespace_are_ignored(lab: NamesLab) -> None:
    """A neighbor sends packets for the loopback address, to a container that routes such packets."""
    received: list[str] = []

    def noted(question: DNSRecord) -> bytes:
        received.append(str(question.q.qname))
        return knows("192.0.2.7")(question)

    async with upstream(noted) as there:
        lab.write(FRONT)
        target = await lab.container("c1", "10.0.1.3")
        await lab.container("c2", "10.0.1.4")
        await lab.serve("c1", FRONT, servers=[there])
        lax = "for i in all eth0; do echo 1 >/proc/sys/net/ipv4/conf/$i/route_localnet; done"
        await lab.namespaces.run(target, shell, lax)
        witness = await lab.open("c1", socket.SOCK_DGRAM)
        witness.bind(("10.0.1.3", 53))
        mac = (await lab.namespaces.run(target, shell, "ip link show eth0")).split("link/ether ")[1]
        wire = await lab.namespaces.run(
            lab.paths.netns / "c2", socket.socket, socket.AF_PACKET, socket.SOCK_RAW
        )
        with wire:
            wire.bind(("eth0", 0))
            question = DNSRecord.question("stolen.example").pack()
            for to, port in (
                ("127.0.0.11", 53),
                ("127.0.0.11", await lab.dns_port("c1")),
                ("10.0.1.3", 53),
            ):
                wire.send(frame(mac.split()[0], "10.0.1.4", to, port, question))
        async with asyncio.timeout(5):
            assert await asyncio.get_running_loop().sock_recv(witness, 512) == question, (
                "such packets do arrive"
            )
        await (await lab.resolver("c1")).ask("honest.example")
        assert received == ["honest.example."]


def frame(mac: str, from_: str, to: str, port: int, data: bytes) -> bytes:
    """An Ethernet frame with a UDP packet."""
    udp = struct.pack("!HHHH", 4444, port, 8 + len(data), 0) + data
    addresses = socket.inet_aton(from_) + socket.inet_aton(to)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + total.to_bytes(2, "big") + header[12:]
    return bytes.fromhex(mac.replace(":", "")) + b"\2" * 6 + b"\x08\0" + header + udp


async def test_a_container_without_a_namespace_is_refused(lab: NamesLab) -> None:
    with pytest.raises(FailedPrecondition, match="cannot serve names in the container's namespace"):
        await lab.client.serve(Named(id="c1", netns=str(lab.paths.netns / "none"), networks=()))
    assert (await lab.client.listing()).served == ()


async def test_a_container_is_served_until_it_is_forgotten(lab: NamesLab) -> None:
    await served(lab)
    resolver = await lab.resolver("c1")
    assert [one.id for one in (await lab.client.listing()).served] == ["c1"]
    other = a_network(a_served("db", "10.0.2.2"), name="back")
    lab.write(other)
    await lab.serve("c1", other)
    assert await resolver.addresses("db") == ["10.0.2.2"], "its networks are others now"
    assert (await resolver.ask("web")).header.rcode == RCODE.NXDOMAIN
    await lab.client.forget("c1")
    await lab.client.forget("c1")
    assert (await lab.client.listing()).served == ()
    with pytest.raises(ConnectionRefusedError):
        await resolver.ask("db")


async def test_a_new_namespace_at_the_same_path_is_served_anew(lab: NamesLab) -> None:
    await served(lab)
    await lab.namespaces.destroy("c1")
    await served(lab)
    assert await (await lab.resolver("c1")).addresses("web") == ["10.0.1.2"]


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
async def test_nonsense_does_no_harm(lab: NamesLab, kind: socket.SocketKind) -> None:
    await served(lab)
    rng = random.Random(1)
    good = DNSRecord.question("web").pack()
    for _ in range(300):
        sender = (await lab.resolver("c1", kind)).socket
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(2, len(good))] = rng.randrange(256)
        sender.send(rng.choice([bytes(damaged), rng.randbytes(rng.randrange(600)), b"", good * 300]))
        sender.close()

    async def is_answered() -> bool:
        with suppress(TimeoutError):  # datagrams may be lost where so many arrive
            async with asyncio.timeout(0.5):
                return await (await lab.resolver("c1", kind)).addresses("web") == ["10.0.1.2"]
        return False

    await wait_until(is_answered)


async def test_a_client_over_its_limit_is_refused_and_others_are_answered(lab: NamesLab) -> None:
    async with upstream(lambda _: None) as silent:
        await served(lab, silent)
        await served(lab, id="c2")
        greedy = (await lab.resolver("c1")).socket
        loop = asyncio.get_running_loop()
        codes: list[int] = []
        asked = 0
        async with asyncio.timeout(10):
            while RCODE.REFUSED not in codes:
                greedy.send(DNSRecord.question(f"{asked}.example").pack())
                asked += 1
                try:
                    async with asyncio.timeout(0.005):
                        codes.append(DNSRecord.parse(await loop.sock_recv(greedy, 512)).header.rcode)
                except TimeoutError:
                    continue
        assert asked > 200
        async with asyncio.timeout(0.5):
            assert await (await lab.resolver("c1")).addresses("web") == ["10.0.1.2"]
            assert await (await lab.resolver("c2")).addresses("web") == ["10.0.1.2"]


async def test_connections_that_are_kept_open_do_not_use_up_the_process(lab: NamesLab) -> None:
    await served(lab)
    await served(lab, id="c2")
    kept = [await lab.resolver("c1", socket.SOCK_STREAM) for _ in range(64)]
    for one in kept:
        await one.ask("web")
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(2):
        assert await loop.sock_recv((await lab.resolver("c1", socket.SOCK_STREAM)).socket, 1) == b""
    assert await (await lab.resolver("c1")).addresses("web") == ["10.0.1.2"]
    assert await (await lab.resolver("c2", socket.SOCK_STREAM)).addresses("web") == ["10.0.1.2"]


async def test_a_table_that_cannot_be_read_leaves_what_was_known(lab: NamesLab) -> None:
    await served(lab)
    resolver = await lab.resolver("c1")
    assert await resolver.addresses("web") == ["10.0.1.2"]
    (lab.paths.tables / FRONT.head.id).write_bytes(b"\xff")
    await lab.client.refresh([FRONT.head.id])
    assert await resolver.addresses("web") == ["10.0.1.2"]
    (lab.paths.tables / FRONT.head.id).unlink()
    await lab.client.refresh()
    assert (await resolver.ask("web")).header.rcode == RCODE.NXDOMAIN


async def test_a_node_has_more_containers_than_select_has_descriptors_for(lab: NamesLab) -> None:
    """Three sockets each: more than 1,024, while rules are loaded for the next one."""
    lab.write(FRONT)
    count = 360
    for number in range(count):
        await lab.container(f"c{number}")
        await lab.serve(f"c{number}", FRONT)
    before = net_process(lab.paths)
    for number in (0, count - 1):
        assert await (await lab.resolver(f"c{number}")).addresses("web") == ["10.0.1.2"]
    await lab.replace_process()
    await lab.change(a_network(a_served("web", "10.0.1.77", ["10.0.1.3"])))
    for number in (0, count - 1):
        assert await (await lab.resolver(f"c{number}")).addresses("web") == ["10.0.1.77"]
    assert net_process(lab.paths) != before
