"""What is said over ``forwarder.sock``: one request, one answer, each with its length before it (4 bytes)."""

from typing import cast

import msgspec

from skep.dataplane.encrypted.forwarder import Status
from skep.dataplane.encrypted.plan import Plan
from skep.dataplane.ipc import framed

FRAME_BYTES_MAX = 64 * 1024 * 1024
"""A plan of 200 networks with 50,000 containers takes 5 MB."""


class Apply(msgspec.Struct, frozen=True, tag=True):
    """Do as the plan says from now on; answered with ``Now`` or ``Refused``."""

    plan: Plan


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Answered with ``Now``."""


class Now(msgspec.Struct, frozen=True, tag=True):
    """How it stands."""

    status: Status


class Refused(msgspec.Struct, frozen=True, tag=True):
    """``message``: a sentence."""

    message: str


Request = Apply | Ask
Answer = Now | Refused


def frame(message: Request | Answer) -> bytes:
    """``message`` with its length before it."""
    return framed(msgspec.msgpack.encode(message))


def decode_request(body: bytes) -> Request:
    return cast("Request", msgspec.msgpack.decode(body, type=Request))


def decode_answer(body: bytes) -> Answer:
    return cast("Answer", msgspec.msgpack.decode(body, type=Answer))
