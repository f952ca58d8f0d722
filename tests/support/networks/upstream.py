"""Name servers for tests, on the node, with configurable responses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from dnslib import QTYPE, RCODE, RR, A, DNSRecord

from skep.dataplane.net_process.protocol import NameServer


@asynccontextmanager
async def upstream(answer: Callable[[DNSRecord], bytes | None]) -> AsyncIterator[NameServer]:
    """Run a name server over UDP and TCP that sends the result of ``answer``, or nothing for None."""

    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
            self.transport = transport

        def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
            if (said := answer(DNSRecord.parse(data))) is not None:
                self.transport.sendto(said, address)

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(2), "big")
        said = answer(DNSRecord.parse(await reader.readexactly(length)))
        if said is not None:
            writer.write(len(said).to_bytes(2, "big") + said)
        writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", port))
    try:
        yield NameServer("127.0.0.1", port)
    finally:
        transport.close()
        server.close()


def knows(address: str, *, count: int = 1) -> Callable[[DNSRecord], bytes]:
    def answer(question: DNSRecord) -> bytes:
        said = question.reply()
        said.add_answer(*(RR(question.q.qname, QTYPE.A, rdata=A(address), ttl=60) for _ in range(count)))
        return said.pack()

    return answer


def fails(code: str) -> Callable[[DNSRecord], bytes]:
    def answer(question: DNSRecord) -> bytes:
        said = question.reply()
        said.header.rcode = getattr(RCODE, code)
        return said.pack()

    return answer
