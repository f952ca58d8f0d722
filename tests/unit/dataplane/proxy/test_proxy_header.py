"""Headers of the PROXY protocol, against the examples and the layout of its specification."""

import socket
import struct

import pytest

from skep.dataplane.proxy.tcp import proxy_header


def test_version_1_is_a_line() -> None:
    assert (
        proxy_header(1, ("192.168.0.1", 56324), ("192.168.0.11", 443))
        == b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
    )
    assert proxy_header(1, ("2001:db8::1", 5), ("::1", 6)) == b"PROXY TCP6 2001:db8::1 ::1 5 6\r\n"


def test_version_1_fits_the_107_bytes_that_receivers_read() -> None:
    longest = "ffff:" * 7 + "ffff"
    assert len(proxy_header(1, (longest, 65535), (longest, 65535))) <= 107


@pytest.mark.parametrize(
    ("family", "client", "own", "kind"),
    [
        (socket.AF_INET, "192.0.2.100", "192.0.2.1", 0x11),
        (socket.AF_INET6, "2001:db8::100", "::1", 0x21),
    ],
)
def test_version_2_is_binary(family: int, client: str, own: str, kind: int) -> None:
    header = proxy_header(2, (client, 4000), (own, 8080))
    assert header[:12] == bytes.fromhex("0d0a0d0a000d0a515549540a")
    version_and_command, family_and_transport, length = struct.unpack_from("!BBH", header, 12)
    assert (version_and_command, family_and_transport) == (0x21, kind)
    body = header[16:]
    assert length == len(body)
    half = (length - 4) // 2
    assert socket.inet_ntop(family, body[:half]) == client
    assert socket.inet_ntop(family, body[half : 2 * half]) == own
    assert struct.unpack("!HH", body[2 * half :]) == (4000, 8080)


def test_a_zone_is_none_of_the_tasks_business() -> None:
    assert proxy_header(1, ("fe80::1%eth0", 5), ("fe80::2%eth0", 6)) == b"PROXY TCP6 fe80::1 fe80::2 5 6\r\n"


def test_without_a_version_there_is_no_header() -> None:
    assert proxy_header(0, ("192.0.2.1", 1), ("192.0.2.2", 2)) == b""
