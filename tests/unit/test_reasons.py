"""What failures are called in messages: the system's words, without numbers and tuples."""

import asyncio
import errno
import socket
import ssl

import pytest

from skep.api.errors import unanswered
from skep.errors import NEEDS_CERTIFICATE, reason_of


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


def test_an_error_of_tls_has_no_code_of_a_library() -> None:
    error = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)")
    assert reason_of(error) == "wrong version number"


def test_a_server_that_requires_a_certificate_is_named_as_such() -> None:
    text = "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required (_ssl.c:2580)"
    assert reason_of(ssl.SSLError(1, text)) == NEEDS_CERTIFICATE


def test_a_certificate_that_is_not_trusted_leads_to_the_authority() -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed (_ssl.c:1006)")
    error.verify_message = "self-signed certificate in certificate chain"
    text = str(unanswered("tcp://manager1:2376", error))
    assert text.startswith("the certificate of tcp://manager1:2376 is not trusted: self-signed certificate")
    assert "ca.pem" in text
    assert "_ssl.c" not in text
