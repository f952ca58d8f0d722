"""Names while the net process is replaced, after it was killed, and without the node process."""

import asyncio
import os
import signal
from pathlib import Path

from dnslib import DNSRecord

from skep.node.netprocess.naming import Naming
from skep.node.netprocess.protocol import NameServer, Place
from skep.node.supervision.supervisor import wait_end
from tests.names_lab import NamesLab, net_process
from tests.tables import a_network, a_served
from tests.upstream import knows, upstream

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


async def test_what_went_while_nobody_looked_is_not_served_again(lab: NamesLab) -> None:
    await served(lab)
    crashed = net_process(lab.paths)
    os.kill(crashed.pid, signal.SIGKILL)
    await wait_end(crashed)
    await lab.namespaces.destroy("c1")
    await lab.start_process()
    assert (await lab.client.listing()).served == ()
    assert list(Path(lab.paths.names).iterdir()) == []


async def test_the_next_node_process_has_just_its_containers_served(lab: NamesLab, tmp_path: Path) -> None:
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.53\noptions ndots:3\n")
    lab.write(FRONT)
    naming = Naming(lab.client, resolver)
    for id in ("c1", "c2"):
        path = await lab.container(id)
        await naming.serve(naming.named(id, path, [Place(FRONT.head.id)]))
    paths = {id: await lab.container(id) for id in ("c3",)} | {"c2": lab.paths.netns / "c2"}
    wanted = [
        naming.named(id, path, [Place(FRONT.head.id)], name_servers=["192.0.2.9"], dns_options=["ndots:0"])
        for id, path in sorted(paths.items())
    ]
    await naming.restore(wanted)
    served = {one.id: one for one in (await lab.client.listing()).served}
    assert served == {one.id: one for one in wanted}
    assert served["c2"].servers == (NameServer("192.0.2.9"),)
    assert naming.named("c4", tmp_path, ()).servers == (NameServer("127.0.0.53"),)
    assert not naming.named("c4", tmp_path, ()).forwards_single_labels
    table = a_network(a_served("new", "10.0.1.9", ["10.0.1.3"]))
    lab.write(table)
    await naming.apply({table.head.id: table}, frozenset({table.head.id}))
    for id in ("c2", "c3"):
        assert await (await lab.resolver(id)).addresses("new") == ["10.0.1.9"]
    await naming.forget("c2")
    await naming.restore(())
    assert (await lab.client.listing()).served == ()
