"""Names while the net process is replaced, after it was killed, and without the node process."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from dnslib import DNSRecord
from msgspec.structs import replace

from skep.dataplane.net_process.name_registration import NameRegistration, named_of
from skep.dataplane.net_process.protocol import NameServer
from skep.model.networks.sandbox import Endpoint, EndpointConfig, Sandbox, SandboxConfig
from skep.model.values.ids import ContainerId, TaskId
from skep.node.supervision.supervisor import wait_end
from tests.support.networks.names_lab import NamesLab, net_process
from tests.support.networks.tables import a_network, a_served
from tests.support.networks.upstream import knows, upstream

FRONT = a_network(a_served("web", "10.0.1.2", ["10.0.1.3", "10.0.1.4"]))


async def served(lab: NamesLab, *servers: NameServer) -> None:
    lab.write(FRONT)
    await lab.container("c1")
    await lab.serve("c1", FRONT, servers=servers)


async def test_no_question_is_lost_while_the_process_is_replaced(lab: NamesLab) -> None:
    """1,000 in a row, each asked once and never again, and one elsewhere that takes its time."""
    async with upstream(knows("192.0.2.7")) as there:
        await served(lab, there)
        resolver = await lab.resolver("c1")
        asked = 0

        async def ask_on() -> None:
            nonlocal asked
            while asked < 1000:
                name, expected = ("web", "10.0.1.2") if asked % 3 else ("example.com", "192.0.2.7")
                assert await resolver.addresses(name) == [expected]
                asked += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(ask_on())
            for _ in range(3):
                begun = asked
                await lab.replace_process()
                assert begun < 1000, "it was replaced while questions were asked"
    assert asked == 1000


async def test_names_go_on_without_the_node_process(lab: NamesLab) -> None:
    """What started the net process, and talked to it, is killed."""
    await served(lab)
    resolver = await lab.resolver("c1")
    lab.client.close()
    os.kill(lab.zygote_pid, signal.SIGKILL)
    for _ in range(1000):
        assert await resolver.addresses("web") == ["10.0.1.2"]
    assert [one.id for one in (await lab.client.listing()).served] == ["c1"], (
        "and the next node process finds it"
    )


async def test_a_question_that_waits_is_answered_by_the_next_process(lab: NamesLab) -> None:
    held = asyncio.Event()
    seen: list[int] = []

    def late(question: DNSRecord) -> bytes | None:
        seen.append(question.header.id)
        held.set()
        return knows("192.0.2.7")(question) if len(seen) > 1 else None

    async with upstream(late) as there:
        await served(lab, there)
        resolver = await lab.resolver("c1")
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(resolver.addresses("example.com"))
            await held.wait()
            await lab.replace_process()
        assert asking.result() == ["192.0.2.7"]


async def test_names_are_there_again_after_a_crash(lab: NamesLab) -> None:
    await served(lab)
    resolver = await lab.resolver("c1")
    port = await lab.dns_port("c1")
    assert await resolver.addresses("web") == ["10.0.1.2"]
    crashed = net_process(lab.paths)
    os.kill(crashed.pid, signal.SIGKILL)
    await wait_end(crashed)
    await lab.start_process()
    async with asyncio.timeout(5):
        while True:
            try:
                assert await resolver.addresses("web") == ["10.0.1.2"]
                break
            except OSError:
                await asyncio.sleep(0.01)  # until the sockets are open again
    assert await lab.dns_port("c1") == port
    assert [one.id for one in (await lab.client.listing()).served] == ["c1"]


async def test_damaged_records_keep_no_process_from_starting_and_the_node_has_them_replaced(
    lab: NamesLab, tmp_path: Path
) -> None:
    lab.write(FRONT)
    naming = NameRegistration(lab.client, tmp_path / "none")
    for id in ("c1", "c2"):
        await naming.attach(*a_container(id, await lab.container(id)))
    crashed = net_process(lab.paths)
    os.kill(crashed.pid, signal.SIGKILL)
    await wait_end(crashed)
    (lab.paths.names / "c1").write_bytes(b"\x00")
    (lab.paths.names / "c3").mkdir()
    await lab.start_process()
    assert [one.id for one in (await lab.client.listing()).served] == ["c2"]
    await naming.ensure_served()
    assert await naming.ensure_served() == {"c1", "c2"}
    for id in ("c1", "c2"):
        assert await (await lab.resolver(id)).addresses("web") == ["10.0.1.2"]
    assert {path.name for path in lab.paths.names.iterdir()} == {"c1", "c2"}


async def test_entries_removed_between_two_processes_are_not_served_again(lab: NamesLab) -> None:
    await served(lab)
    crashed = net_process(lab.paths)
    os.kill(crashed.pid, signal.SIGKILL)
    await wait_end(crashed)
    await lab.namespaces.destroy("c1")
    await lab.start_process()
    assert (await lab.client.listing()).served == ()
    assert list(Path(lab.paths.names).iterdir()) == []


def a_container(id: str, netns: Path, **config: Any) -> tuple[SandboxConfig, Sandbox]:
    """One that is on the network ``front``, by a task of the same name."""
    place = EndpointConfig(head=FRONT.head, addresses=("10.0.1.3/24",))
    connected = Endpoint(config=place, interface="eth0", port="p", mac_address="02:42:0a:00:01:03")
    return (
        SandboxConfig(id=ContainerId(id), name=id, task=TaskId(id), endpoints=(place,), **config),
        Sandbox(netns=str(netns), address="172.18.0.2", endpoints=(connected,)),
    )


async def test_the_next_node_process_has_just_its_containers_served(lab: NamesLab, tmp_path: Path) -> None:
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.53\noptions ndots:3\n")
    lab.write(FRONT)
    naming = NameRegistration(lab.client, resolver)
    for id in ("c1", "c2"):
        await naming.attach(*a_container(id, await lab.container(id)))
    own = {"nameservers": ("192.0.2.9",), "dns_options": ("ndots:0",)}
    live = [
        a_container("c2", lab.paths.netns / "c2", **own),
        a_container("c3", await lab.container("c3"), **own),
    ]
    await naming.restore(live)
    served = {one.id: one for one in (await lab.client.listing()).served}
    assert served == {config.id: named_of(config, sandbox, resolver.read_text()) for config, sandbox in live}
    assert served["c2"].servers == (NameServer("192.0.2.9"),)
    table = a_network(a_served("new", "10.0.1.9", ["10.0.1.3"]))
    lab.write(table)
    await naming.refresh([table.head.id])
    for id in ("c2", "c3"):
        assert await (await lab.resolver(id)).addresses("new") == ["10.0.1.9"]
    await naming.detach(ContainerId("c2"))
    await naming.restore([])
    assert (await lab.client.listing()).served == ()


def test_what_a_container_is_to_have_follows_from_its_places_and_its_nodes_resolver(tmp_path: Path) -> None:
    node = "nameserver 127.0.0.53\noptions ndots:3\n"
    config, sandbox = a_container("c1", tmp_path)

    named = named_of(config, sandbox, node)

    assert named is not None
    assert named.servers == (NameServer("127.0.0.53"),)
    assert not named.forwards_single_labels
    assert named.networks[0].addresses == ("10.0.1.3",)
    assert named_of(config, replace(sandbox, endpoints=()), node) is None
    inside = named_of(config, replace(sandbox, address=""), node)
    assert inside is not None
    assert not inside.forwards
