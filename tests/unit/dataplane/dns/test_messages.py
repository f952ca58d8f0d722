"""DNS messages: what is understood, what is refused, and that nothing can be made of them."""

import struct
from ipaddress import IPv4Address

import pytest
from dnslib import AAAA, EDNS0, QTYPE, RR, SRV, A, DNSHeader, DNSQuestion, DNSRecord
from hypothesis import example, given
from hypothesis import strategies as st

from skep.model.networks import dns_messages as messages
from skep.model.networks.dns_messages import Query, Record, parse, reply

ADDRESS = bytes((10, 0, 1, 2))


def encode_query(name: str = "web", type: str = "A", **header: int) -> bytes:
    return DNSRecord(DNSHeader(id=7, **{"rd": 1, **header}), q=DNSQuestion(name, getattr(QTYPE, type))).pack()


def with_options(size: int, *, version: int = 0) -> bytes:
    record = DNSRecord.parse(encode_query())
    record.add_ar(EDNS0(udp_len=size, version=version))
    return record.pack()


def parsed(data: bytes) -> Query:
    query = parse(data)
    assert isinstance(query, Query)
    return query


def refused(data: bytes) -> int:
    answer = parse(data)
    assert isinstance(answer, bytes)
    assert answer[:2] == data[:2]
    assert answer[2] & 0x80
    return answer[3] & 0xF


def test_a_question_is_read_without_regard_to_case() -> None:
    query = parsed(encode_query("Tasks.WEB.Front."))
    assert (query.name, query.type, query.class_, query.udp_bytes_max) == (
        "tasks.web.front",
        messages.A,
        1,
        512,
    )


def test_an_answer_is_what_another_reader_takes_it_for() -> None:
    query = parsed(encode_query("WEB"))
    answer = DNSRecord.parse(reply(query, 0, (Record(messages.A, ADDRESS),), ttl_s=1))
    assert (answer.header.id, answer.header.qr, answer.header.ra, answer.header.rd) == (7, 1, 1, 1)
    assert str(answer.q.qname) == "WEB.", "the question is repeated as it was"
    assert [(str(one.rname), one.rtype, one.ttl, str(one.rdata)) for one in answer.rr] == [
        ("WEB.", QTYPE.A, 1, "10.0.1.2")
    ]


def test_names_in_answers_are_read_by_another_reader() -> None:
    target = messages.encoded("web.1.t1.front")
    query = parsed(encode_query("_80._tcp.web", "SRV"))
    service = Record(messages.SRV, struct.pack("!HHH", 0, 0, 80) + target)
    packed = reply(query, 0, (service,), (Record(messages.A, ADDRESS, target),))
    answer = DNSRecord.parse(packed)
    assert isinstance(answer.rr[0].rdata, SRV)
    assert (answer.rr[0].rdata.port, str(answer.rr[0].rdata.target)) == (80, "web.1.t1.front.")
    assert str(answer.ar[0].rname) == "web.1.t1.front."


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encode_query()[:-1], messages.FORMERR),
        (encode_query()[:12], messages.FORMERR),
        (encode_query() + b"x" * 5000, messages.FORMERR),
        (DNSRecord(DNSHeader(id=7)).pack(), messages.FORMERR),
        (DNSRecord(DNSHeader(id=7), questions=[DNSQuestion("a"), DNSQuestion("b")]).pack(), messages.FORMERR),
        (encode_query(opcode=5), messages.NOTIMP),
        (encode_query(opcode=4), messages.NOTIMP),
        (encode_query()[:12] + b"\xc0\x0c\0\1\0\1", messages.FORMERR),
        (encode_query()[:12] + b"\x40a\0\0\1\0\1", messages.FORMERR),
        (encode_query()[:12] + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1", messages.FORMERR),
        (with_options(1232)[:-1], messages.FORMERR),
        (encode_query()[:11] + b"\1" + encode_query()[12:], messages.FORMERR),
    ],
    ids=[
        "cut", "no question at all", "oversized", "none", "several", "update", "notify", "pointer to itself",
        "label type of long ago", "name of 256 bytes", "options cut", "options missing",
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(data: bytes, code: int) -> None:
    assert refused(data) == code


@pytest.mark.parametrize("data", [b"", b"\0" * 11, DNSRecord.parse(encode_query()).reply().pack()])
def test_answers_and_fragments_are_not_answered(data: bytes) -> None:
    assert parse(data) is None


@pytest.mark.parametrize(("said", "room"), [(0, 512), (100, 512), (1232, 1232), (65535, 4096)])
def test_a_client_says_how_much_it_can_take(said: int, room: int) -> None:
    query = parsed(with_options(said))
    assert query.udp_bytes_max == room
    many = tuple(Record(messages.A, bytes((10, 0, number >> 8, number & 255))) for number in range(1000))
    packed = reply(query, 0, many, bytes_max=query.udp_bytes_max)
    assert room - 16 < len(packed) <= room
    answer = DNSRecord.parse(packed)
    assert answer.header.tc == 1
    assert {one.rdata.__class__ for one in answer.rr} == {A}
    assert answer.ar[0].rtype == QTYPE.OPT
    whole = DNSRecord.parse(reply(query, 0, many, bytes_max=messages.TCP_BYTES_MAX))
    assert (len(whole.rr), whole.header.tc) == (1000, 0)


def test_extra_records_are_left_out_without_a_word() -> None:
    query = parsed(encode_query())
    extra = tuple(Record(messages.AAAA, bytes(16), messages.encoded("x" * 60)) for _ in range(10))
    answer = DNSRecord.parse(reply(query, 0, (Record(messages.A, ADDRESS),), extra))
    assert answer.header.tc == 0
    assert 0 < len(answer.ar) < 10
    assert isinstance(answer.ar[0].rdata, AAAA)


def test_options_of_a_later_version_are_refused_with_ours() -> None:
    answer = parse(with_options(1232, version=1))
    assert isinstance(answer, bytes)
    read = DNSRecord.parse(answer)
    assert (read.header.rcode, read.ar[0].ttl >> 24, read.ar[0].ttl >> 16 & 255) == (0, 1, 0)


def test_an_answer_counts_only_for_the_question_that_was_asked() -> None:
    question = DNSRecord.parse(encode_query("web.example"))
    answer = question.replyZone("web.example 60 A 192.0.2.1").pack()
    asked_for = parsed(encode_query("WEB.example")).question
    assert messages.is_response(answer, 7, asked_for)
    assert not messages.is_response(answer, 8, asked_for)
    assert not messages.is_response(answer, 7, parsed(encode_query("mail.example")).question)
    assert not messages.is_response(encode_query("web.example"), 7, asked_for), "that is a question"
    assert not messages.is_response(b"", 7, asked_for)


def test_an_answer_from_elsewhere_that_is_too_long_says_so_in_the_room_there_is() -> None:
    query = parsed(encode_query("web.example"))
    record = DNSRecord.parse(encode_query("web.example")).reply()
    record.add_answer(*(RR("web.example", rdata=A(str(IPv4Address(number)))) for number in range(100)))
    cut = DNSRecord.parse(messages.fitting(record.pack(), query, 512))
    assert (cut.header.tc, cut.header.id, len(cut.rr), str(cut.q.qname)) == (1, 7, 0, "web.example.")
    assert messages.fitting(record.pack(), query, 65535)[2:] == record.pack()[2:]


@given(st.binary(max_size=600))
@example(encode_query())
def test_no_bytes_make_it_fail(data: bytes) -> None:
    """Any bytes give a question, a reply of at most the minimal size, or nothing."""
    answer = parse(data)
    if isinstance(answer, bytes):
        assert len(answer) <= messages.UDP_BYTES_MIN
        assert answer[2] & 0x80


@given(st.data())
def test_no_damaged_question_makes_it_fail_or_grow(data: st.DataObject) -> None:
    """What remains of a question after some of its bytes were changed."""
    damaged = bytearray(
        data.draw(st.sampled_from([encode_query("a.bc.def"), with_options(1232), encode_query("x", "SRV")]))
    )
    for _ in range(data.draw(st.integers(0, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    query = parse(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    if isinstance(query, Query):
        count = data.draw(st.integers(0, 500))
        packed = reply(query, 0, (Record(messages.A, ADDRESS),) * count, bytes_max=query.udp_bytes_max)
        assert len(packed) <= max(query.udp_bytes_max, messages.UDP_BYTES_MIN)
        if query.name.isascii():  # the other reader takes no other names
            assert DNSRecord.parse(packed).header.id == query.id
        assert packed[2] & 2 or struct.unpack_from("!H", packed, 6)[0] == count


@given(
    st.lists(
        st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=63), min_size=1, max_size=3
    )
)
def test_names_are_read_as_they_were_written(labels: list[str]) -> None:
    name = ".".join(labels)
    wire = struct.pack("!HHHHHH", 7, 0, 1, 0, 0, 0) + messages.encoded(name) + b"\0\1\0\1"
    assert parsed(wire).name == messages.key(name)


@pytest.mark.parametrize("name", ["", "a..b", "x" * 64, ".".join(["x" * 63] * 4)])
def test_what_cannot_be_a_name_is_not_written(name: str) -> None:
    with pytest.raises(ValueError, match="not a DNS name"):
        messages.encoded(name)
