"""Heads of HTTP requests, where the bodies behind them end, and which process answers them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.api.http.framing import (
    Body,
    Chunked,
    Malformed,
    Sized,
    is_for_manager,
    parse_request,
    path_of,
    plain_ping,
    read_head,
)


def head(*lines: str) -> bytes:
    return "\r\n".join((*lines, "", "")).encode()


def test_a_request_is_parsed() -> None:
    request = parse_request(head("GET /v1.41/tasks?x=1 HTTP/1.1", "Host: docker", "X-A:  b c "))
    assert (request.method, request.target, request.upgrades) == ("GET", "/v1.41/tasks?x=1", False)
    assert request.head.all(b"x-a") == [b"b c"]


def test_the_absolute_form_of_a_target_is_understood() -> None:
    assert parse_request(head("GET http://docker/info HTTP/1.1")).target == "/info"
    assert parse_request(head("GET http://docker HTTP/1.1")).target == "/"


@pytest.mark.parametrize(
    "lines",
    [
        ("GET /info",),
        ("GET  /info HTTP/1.1",),
        ("GET /info HTTP/2",),
        ("G3T /info HTTP/1.1",),
        ("GET info HTTP/1.1",),
        ("GET /info HTTP/1.1", "no colon"),
        ("GET /info HTTP/1.1", "Name : blank before the colon"),
        ("GET /info HTTP/1.1", "A: b", " folded"),
        ("GET /info HTTP/1.1", ": no name"),
        ("GET /info HTTP/1.1", "A: b\nB: c"),
        ("GET /in\nfo HTTP/1.1",),
        ("GET /info HTTP/1.1", "A: b\0c"),
        ("GET /\u00e4 HTTP/1.1",),
    ],
)
def test_what_is_no_request_is_refused(lines: tuple[str, ...]) -> None:
    with pytest.raises(Malformed):
        parse_request(head(*lines))


_FIRST_LINES = (
    "GET /tasks HTTP/1.1",
    "POST /v1.41/services/create?a=b HTTP/1.1",
    "get / HTTP/1.1",
    "GET / HTTP/1.0",
)
_LINES = (
    "Host: docker",
    "content-length: 17",
    "CONTENT-LENGTH:\t4 ",
    "Content-Length: 4, 4",
    "Content-Length: x",
    "Content-Length : 4",
    "X-Content-Length: 5",
    "Transfer-Encoding: chunked",
    "Connection: keep-alive",
    "Keep-Alive: 5",
    "Expect: 100-continue",
    "Upgrade: tcp",
    " folded: yes",
    "X-Registry-Auth: \u00fc\t,",
    "A: b\nB: c",
    "nothing",
)


@given(st.sampled_from(_FIRST_LINES), st.lists(st.sampled_from(_LINES), max_size=4))
def test_the_short_way_reads_a_head_as_the_parser_does(first_line, lines):
    raw = head(first_line, *lines)
    try:
        request = parse_request(raw)
        body = request.body()
    except Malformed:
        with pytest.raises(Malformed):
            read_head(raw)
        return
    read = read_head(raw)
    assert (read.method, read.target, read.upgrades) == (request.method, request.target, request.upgrades)
    assert _shape(read.body) == _shape(body)


def _shape(body: Body) -> tuple[type[Body], int]:
    """Which kind of body, and how long; a length of nothing is no body."""
    length = body.bytes_left if isinstance(body, Sized) else 0
    return (Body if isinstance(body, Sized) and not length else type(body)), length


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 1", "Content-Length: 2"),
        ("Content-Length: 1", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding: identity",),
        ("Content-Length: -1",),
        ("Content-Length: +1",),
        ("Content-Length: 1e3",),
        ("Content-Length: 9999999999999999999",),
    ],
)
def test_a_length_that_could_be_read_in_two_ways_is_refused(headers: tuple[str, ...]) -> None:
    with pytest.raises(Malformed):
        read_head(head("POST /x HTTP/1.1", *headers))


@pytest.mark.parametrize(
    ("first_line", "headers", "ping"),
    [
        ("GET /_ping HTTP/1.1", ("Host: docker",), ("GET", None)),
        ("HEAD /_ping HTTP/1.1", ("Host: docker", "User-Agent: Docker-Client/20.10"), ("HEAD", None)),
        ("GET /v1.41/_ping HTTP/1.1", ("Accept-Encoding: identity",), ("GET", "1.41")),
        ("GET /_ping HTTP/1.0", ("Host: docker",), None),
        ("GET /_ping HTTP/1.1", ("Connection: close",), None),
        ("GET /_ping HTTP/1.1", ("Content-Length: 3",), None),
        ("GET /_ping HTTP/1.1", ("Transfer-Encoding: chunked",), None),
        ("GET /_ping?x=1 HTTP/1.1", (), None),
        ("POST /_ping HTTP/1.1", (), None),
        ("GET /v1.41/info HTTP/1.1", (), None),
    ],
)
def test_only_a_ping_with_nothing_beside_it_is_a_plain_one(
    first_line: str, headers: tuple[str, ...], ping: tuple[str, str | None] | None
) -> None:
    raw = head(first_line, *headers)
    assert plain_ping(raw) == ping
    assert plain_ping(raw[:-1]) is None
    assert plain_ping(raw + raw) is None


def test_an_upgrade_is_seen() -> None:
    assert parse_request(head("POST /x HTTP/1.1", "Connection: keep-alive, Upgrade", "Upgrade: tcp")).upgrades


@pytest.mark.parametrize(
    ("target", "path", "is_managers"),
    [
        ("/v1.41/services/web?insertDefaults=1", "/services/web", True),
        ("/swarm", "/swarm", True),
        ("/swarm/unlockkey", "/swarm/unlockkey", True),
        ("/swarm/init", "/swarm/init", False),
        ("/swarm/init/x", "/swarm/init/x", True),
        ("/servicesx", "/servicesx", False),
        ("//x/services", "/x/services", False),
        ("//v1.41//services//web/?x=1//", "/services/web", True),
        ("/networks/", "/networks", False),
        ("/%2F/services", "/%2F/services", False),
        ("//", "/", False),
        ("/v1.41/v1.41/services", "/v1.41/services", False),
        ("/%73ervices", "/%73ervices", False),
        ("/containers/json?x=/services", "/containers/json", False),
        ("/_skep/lag", "/_skep/lag", False),
        ("/skep/tasks/x/explain", "/skep/tasks/x/explain", True),
        ("/skep/restore", "/skep/restore", False),
    ],
)
def test_one_rule_says_what_the_manager_answers(target: str, path: str, is_managers: bool) -> None:
    assert path_of(target) == path
    assert is_for_manager(path) is is_managers


def test_headers_are_replaced_and_others_kept_in_order() -> None:
    request = parse_request(head("GET / HTTP/1.1", "A: 1", "Connection: keep-alive", "B: 2"))
    sent = request.head.with_headers((b"Connection", b"close"))
    assert sent == b"GET / HTTP/1.1\r\na: 1\r\nb: 2\r\nConnection: close\r\n\r\n"


def chunked(pieces: list[bytes], trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailers + b"\r\n"


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    trailers=st.sampled_from([b"", b"A: b\r\n", b"A: b\r\nC: d\r\n"]),
    rest=st.binary(max_size=20),
    cuts=st.lists(st.integers(0, 300), max_size=6),
)
def test_a_chunked_body_ends_at_its_end_however_it_arrives(
    pieces: list[bytes], trailers: bytes, rest: bytes, cuts: list[int]
) -> None:
    whole = chunked(pieces, trailers)
    stream = whole + rest
    body, taken, left = Chunked(), b"", b""
    positions = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(positions):
        mine, others = body.take(stream[start:end])
        taken += mine
        left += others
    assert body.is_complete
    assert (taken, left) == (whole, rest)


@pytest.mark.parametrize("bad", [b"x\r\n", b"-1\r\n", b"\r\n", b"1" * 16 + b"\r\n", b"1" * 5000])
def test_a_chunk_without_a_size_is_refused(bad: bytes) -> None:
    with pytest.raises(Malformed):
        Chunked().take(bad)


@given(length=st.integers(0, 50), data=st.binary(min_size=50, max_size=80), cut=st.integers(0, 50))
def test_a_sized_body_takes_exactly_its_bytes(length: int, data: bytes, cut: int) -> None:
    body = Sized(length)
    first, left = body.take(data[:cut])
    second, rest = body.take(data[cut:])
    assert first + second == data[:length]
    assert left + rest == data[length:]
    assert body.is_complete
