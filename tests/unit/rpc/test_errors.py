"""Errors on their way over the wire and back."""

import asyncio
import ssl

import pytest

from skep import errors
from skep.rpc.errors import STATUS_OF, from_status, peer_errors, to_status
from skep.rpc.status import CallFailed, Lost, StatusCode


@pytest.mark.parametrize(("error", "status"), STATUS_OF, ids=str)
def test_an_error_keeps_its_meaning_over_the_wire(error, status):
    reported = to_status(error("the reason"))
    assert reported.status is status
    received = from_status(reported)
    assert str(received) == "the reason"
    if status is not StatusCode.UNKNOWN:
        assert type(received) is error


def test_a_subclass_travels_as_what_it_is_a_kind_of():
    class Special(errors.NotFound):
        pass

    assert to_status(Special("x")).status is StatusCode.NOT_FOUND


def test_a_long_message_is_cut_because_it_travels_as_a_header():
    assert len(to_status(errors.InvalidArgument("x" * 100_000)).message) == 2048


@pytest.mark.parametrize(
    "failure",
    [
        TimeoutError(),
        ConnectionRefusedError("refused"),
        Lost("gone"),
        ssl.SSLError("handshake"),
        asyncio.IncompleteReadError(b"", 1),
        CallFailed(StatusCode.DEADLINE_EXCEEDED),
    ],
    ids=lambda failure: type(failure).__name__,
)
async def test_a_lost_peer_is_unavailable(failure):
    with pytest.raises(errors.Unavailable), peer_errors("10.0.0.1:2377"):
        raise failure


async def test_a_bug_stays_a_bug():
    with pytest.raises(ZeroDivisionError), peer_errors("10.0.0.1:2377"):
        raise ZeroDivisionError
