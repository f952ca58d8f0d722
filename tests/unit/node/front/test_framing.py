"""Heads of HTTP messages, and where the bodies behind them end."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.node.front.framing import (
    Chunked,
    Malformed,
    NoBody,
    PlainRequest,
    Sized,
    UntilClose,
    body_of_request,
    body_of_response,
    parse_request,
    parse_response,
    plain_answer_bytes,
    plain_request,
)


def head(*lines: str) -> bytes:
    return "\r\n".join((*lines, "", "")).encode()


def test_a_request_is_taken_apart() -> None:
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
def test_a_plain_request_is_what_the_parser_says_it_is(first_line, lines):
    raw = head(first_line, *lines)
    plain = plain_request(raw)
    if plain is None:
        return
    request = parse_request(raw)
    assert (plain.method, plain.target) == (request.method, request.target)
    body = body_of_request(request)
    assert body.ends_within(plain.body_bytes)
    assert plain.body_bytes == 0 or not body.ends_within(plain.body_bytes - 1)
    assert not request.upgrades
    assert not request.head.is_last
    assert not request.head.all(b"expect")
    assert request.head.with_headers(without=(b"connection", b"keep-alive")).lower() == _without_blanks(raw)


def _without_blanks(raw: bytes) -> bytes:
    """A head in lower case, its values without outer blanks."""
    first_line, *lines = raw.removesuffix(b"\r\n\r\n").lower().split(b"\r\n")
    pairs = [line.partition(b":") for line in lines]
    return b"\r\n".join([first_line, *(name + b": " + value.strip(b" \t") for name, _, value in pairs)]) + (
        b"\r\n\r\n"
    )


@given(
    st.sampled_from(["HTTP/1.1 201 Created", "HTTP/1.1 204 No Content", "HTTP/1.1 101 X", "HTTP/1.0 200 OK"]),
    st.lists(st.sampled_from(_LINES), max_size=4),
)
def test_a_plain_answer_is_what_the_parser_says_it_is(first_line, lines):
    raw = head(first_line, *lines)
    body_bytes = plain_answer_bytes(raw)
    if body_bytes is None:
        return
    response = parse_response(raw)
    body = body_of_response(response, "POST")
    assert isinstance(body, Sized)
    assert body.ends_within(body_bytes)
    assert body_bytes == 0 or not body.ends_within(body_bytes - 1)
    assert response.status >= 200
    assert not response.head.is_last


def test_what_clients_and_managers_usually_send_is_plain():
    asked = plain_request(
        head(
            "POST /v1.41/services/create HTTP/1.1",
            "Host: docker",
            "User-Agent: Docker-Client/20.10.24+dfsg1 (linux)",
            "Content-Length: 231",
            "Content-Type: application/json",
            "X-Registry-Auth: e30=",
        )
    )
    assert asked == PlainRequest("POST", "/v1.41/services/create", 231)
    assert plain_request(head("GET /services HTTP/1.1", "Host: d")) == PlainRequest("GET", "/services", 0)
    answer = (
        "Content-Type: application/json",
        "Api-Version: 1.41",
        "Content-Length: 35",
        "Server: Skep/0.1.0",
    )
    assert plain_answer_bytes(head("HTTP/1.1 201 Created", *answer)) == 35


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
        body_of_request(parse_request(head("POST /x HTTP/1.1", *headers)))


@pytest.mark.parametrize(
    ("status", "method", "headers", "expected"),
    [
        (200, "GET", ("Content-Length: 3",), Sized),
        (200, "GET", ("Transfer-Encoding: chunked",), Chunked),
        (200, "GET", (), UntilClose),
        (200, "HEAD", ("Content-Length: 3",), NoBody),
        (204, "GET", (), NoBody),
        (304, "GET", ("Content-Length: 3",), NoBody),
        (100, "POST", (), NoBody),
    ],
)
def test_the_body_of_an_answer_ends_where_its_head_says(
    status: int, method: str, headers: tuple[str, ...], expected: type
) -> None:
    response = parse_response(head(f"HTTP/1.1 {status} X", *headers))
    assert isinstance(body_of_response(response, method), expected)


def test_an_upgrade_is_seen() -> None:
    assert parse_request(head("POST /x HTTP/1.1", "Connection: keep-alive, Upgrade", "Upgrade: tcp")).upgrades


def test_a_connection_ends_when_its_message_says_so() -> None:
    assert parse_request(head("GET / HTTP/1.1", "Connection: Close")).head.is_last
    assert parse_request(head("GET / HTTP/1.0")).head.is_last
    assert not parse_request(head("GET / HTTP/1.0", "Connection: keep-alive")).head.is_last
    assert not parse_request(head("GET / HTTP/1.1")).head.is_last


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
