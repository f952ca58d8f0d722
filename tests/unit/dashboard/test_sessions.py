"""Sessions of the dashboard: who has one, for how long, and which names they are for."""

from itertools import count

import pytest

from skep.dashboard.sessions import (
    ATTEMPTS,
    LIFE_S,
    PER_TOKEN_MAX,
    Attempts,
    BrowserSession,
    BrowserSessions,
    CertificateNames,
)
from skep.model.networks.addresses import is_public
from skep.model.permissions.access import Credential

ANN, BOB = Credential.of_token(b"ann"), Credential.of_token(b"bob")


def some_sessions() -> BrowserSessions:
    numbers = count()
    return BrowserSessions(lambda: f"{next(numbers):032}")


def cookie_of(session: BrowserSession, name: str) -> str:
    return session.cookie if name == session.cookie_name else ""


def test_a_session_is_found_by_its_path_and_cookie_until_its_end() -> None:
    sessions = some_sessions()
    ann, _ = sessions.open(ANN, 0)
    bob, _ = sessions.open(BOB, 0)
    assert sessions.find(ann.key, lambda name: cookie_of(ann, name), LIFE_S - 1) is ann
    assert sessions.find(ann.key, lambda name: cookie_of(bob, name), 1) is None
    assert sessions.find(ann.key, lambda _: bob.cookie, 1) is None
    assert sessions.find("other", lambda _: ann.cookie, 1) is None
    assert sessions.find(ann.key, lambda name: cookie_of(ann, name), LIFE_S) is None
    sessions.end(bob)
    assert sessions.find(bob.key, lambda name: cookie_of(bob, name), 1) is None
    assert sessions.end_expired(LIFE_S) == (ann,)
    assert sessions.end_expired(LIFE_S) == ()


def test_the_oldest_session_of_a_token_ends_for_one_too_many() -> None:
    sessions = some_sessions()
    other, _ = sessions.open(BOB, 0)
    first, _ = sessions.open(ANN, 1)
    for at in range(2, PER_TOKEN_MAX + 1):
        assert sessions.open(ANN, at)[1] == ()
    assert sessions.open(ANN, 100)[1] == (first,)
    assert sessions.find(first.key, lambda name: cookie_of(first, name), 101) is None
    assert sessions.find(other.key, lambda name: cookie_of(other, name), 101) is other


def test_logins_of_an_address_are_bounded_and_those_of_others_go_on() -> None:
    attempts = Attempts()
    assert [attempts.admit("10.0.0.1", 0) for _ in range(ATTEMPTS + 1)] == [True] * ATTEMPTS + [False]
    assert attempts.admit("10.0.0.2", 0)
    assert attempts.admit("10.0.0.1", 60 / ATTEMPTS)
    assert not attempts.admit("10.0.0.1", 60 / ATTEMPTS)
    for i in range(10_000):
        attempts.admit(f"source {i}", 7)
    assert len(attempts.buckets) <= 4096


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("m1.example.com:8443", True),
        ("M1.Example.com", True),
        ("a.lab.example:8443", True),
        ("lab.example", False),
        ("b.a.lab.example", False),
        (".lab.example", False),
        ("10.0.0.5:8443", True),
        ("10.0.0.9:8443", True),
        ("10.0.0.6:8443", False),
        ("[fd00::5]:8443", True),
        ("[fd00::6]:8443", False),
        ("attacker.example:8443", False),
        ("m1.example.com.attacker.example", False),
        ("m1.example.com@attacker.example", False),
        ("", False),
        ("[", False),
    ],
)
def test_a_host_is_one_of_the_certificate_or_the_address_that_was_reached(host: str, expected: bool) -> None:
    names = CertificateNames(
        frozenset({"m1.example.com", "*.lab.example"}), frozenset({"10.0.0.5", "fd00::5"})
    )
    assert names.has(host, "::ffff:10.0.0.9") is expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.5", False),
        ("127.0.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("8.8.8.8", True),
        ("::ffff:8.8.8.8", True),
        ("2606:4700::1", True),
    ],
)
def test_public_addresses_are_those_of_the_internet(address: str, expected: bool) -> None:
    assert is_public(address) is expected
