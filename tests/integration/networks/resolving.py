"""An independent DNS client: dnslib writes the questions and reads the answers; each is asked once."""

import random
import socket
from collections.abc import Iterable

from dnslib import QTYPE, RCODE, DNSRecord

SERVER = ("127.0.0.11", 53)
WITHIN_S = 5.0


def ask(name: str, kind: str = "A") -> tuple[str, ...]:
    """What the answer has, in its order; ``("NXDOMAIN",)`` and the like if that is the answer.

    In the namespace of the calling thread.  Raises: OSError: there was no answer, or not to this question.
    """
    question = DNSRecord.question(name, kind)
    question.header.id = random.getrandbits(16)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(WITHIN_S)
        asking.connect(SERVER)
        asking.send(question.pack())
        response = DNSRecord.parse(asking.recv(65535))
    if response.header.id != question.header.id or response.q != question.q:
        raise OSError(f"asked for {name}, answered: {response}")
    if response.header.rcode:
        return (RCODE.get(response.header.rcode),)
    wanted = getattr(QTYPE, kind)
    return tuple(str(record.rdata) for record in response.rr if record.rtype == wanted)


def ask_all(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name -> what the answer has.  As ``ask``."""
    return {name: ask(name) for name in names}
