"""What failures are called in messages: the system's words, without numbers and tuples."""

import asyncio
import errno
import socket
import ssl

import pytest

from skep.errors import reason_of


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EHOSTUNREACH, "Connect call failed ('192.0.2.1', 2377)"), "no route to host"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed"), "connection refused"),
        (
            OSError(
                "Multiple exceptions: [Errno 111] Connect call failed ('::1', 1), [Errno 111] Connect call failed"
            ),
            "connection refused",
        ),
        (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
        (TimeoutError(), "timed out"),
        (asyncio.IncompleteReadError(b"", 3), "0 bytes read on a total of 3 expected bytes"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_a_failure_is_named_by_the_systems_words(error: Exception, words: str) -> None:
    assert reason_of(error) == words


def test_the_number_of_an_error_of_tls_is_not_the_systems() -> None:
    assert "certificate" in reason_of(ssl.SSLError(1, "certificate verify failed"))
