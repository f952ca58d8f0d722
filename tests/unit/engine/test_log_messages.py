"""What log drivers send for a line."""

import msgspec
import pytest

from skep.engine.containers.container import LogEntry, StandardStream
from skep.engine.log_drivers.facts import LogFacts
from skep.engine.log_drivers.fluentd import Fluentd
from skep.engine.log_drivers.gelf import Gelf
from skep.engine.log_drivers.journald import Journald, field_name
from skep.engine.log_drivers.message import LogMessage, Pieces, Undeliverable, text_of
from skep.engine.log_drivers.splunk import Splunk
from tests.support.engine.log_receivers import fluentd_messages, gelf_messages, journal_fields

MOMENT_NS = 1_769_860_800_123_456_789
FACTS = LogFacts(
    id="0123456789abcdef" * 4,
    name="web",
    image_id="sha256:" + "ab" * 32,
    image="busybox:1",
    command="sh",
    created="2026-01-31T12:00:00Z",
    hostname="node",
    attributes={"io.skep.one": "1", "_hidden": "two\nlines"},
)


def message(line: bytes, stream: StandardStream = StandardStream.STDOUT) -> LogMessage:
    return LogMessage(MOMENT_NS, stream, line)


def test_pieces_of_a_line_are_counted_and_have_the_time_of_the_first() -> None:
    out, err = StandardStream.STDOUT, StandardStream.STDERR
    entries = [
        LogEntry(1, out, b"whole\n"),
        LogEntry(2, out, b"a"),
        LogEntry(3, err, b"other\n"),
        LogEntry(4, out, b"b"),
        LogEntry(5, out, b"c\n"),
        LogEntry(6, out, b"again\n"),
    ]
    found = list(Pieces().messages(entries))
    assert [(one.timestamp_ns, one.line) for one in found] == [
        (1, b"whole"),
        (2, b"a"),
        (3, b"other"),
        (2, b"b"),
        (2, b"c"),
        (6, b"again"),
    ]
    partial = [one.partial for one in found if one.partial is not None]
    assert [(one.ordinal, one.last) for one in partial] == [(1, False), (2, False), (3, True)]
    assert len({one.id for one in partial}) == 1


def test_bytes_that_are_no_utf8_are_replaced_one_by_one_as_in_go() -> None:
    assert text_of(b"a\xff\xe2\x82b") == "a\ufffd\ufffd\ufffdb"


def test_a_line_in_the_journal_has_its_container_and_may_have_newlines_in_its_fields() -> None:
    sink = Journald({"tag": "{{.Name}}"}, FACTS)
    fields = journal_fields(sink.datagram(message(b"wrong\xff", StandardStream.STDERR)))
    assert fields["MESSAGE"] == b"wrong\xff"
    assert fields["PRIORITY"] == b"3"
    assert fields["CONTAINER_NAME"] == fields["CONTAINER_TAG"] == fields["SYSLOG_IDENTIFIER"] == b"web"
    assert fields["CONTAINER_ID"] == b"0123456789ab"
    assert fields["IMAGE_NAME"] == b"busybox:1"
    assert fields["IO_SKEP_ONE"] == b"1"
    assert fields["HIDDEN"] == b"two\nlines"
    assert fields["SYSLOG_TIMESTAMP"] == b"2026-01-31T12:00:00.123456789Z"
    assert journal_fields(sink.datagram(message(b"next")))["CONTAINER_LOG_ORDINAL"] == b"2"


@pytest.mark.parametrize(("name", "field"), [("a.b-c", "A_B_C"), ("__x", "X"), ("ä1", "1"), ("_", "")])
def test_names_of_fields_are_capitals_and_digits(name: str, field: str) -> None:
    assert field_name(name) == field


def test_a_long_line_is_sent_in_chunks_and_one_that_is_too_long_not_at_all() -> None:
    sink = Gelf({"gelf-address": "udp://127.0.0.1:1", "gelf-compression-type": "none"}, FACTS)
    parts = list(sink.parts(message(b"x" * 10_000)))
    assert len(parts) == 8
    assert all(len(part) <= 1420 for part in parts)
    assert gelf_messages(parts)[0]["short_message"] == "x" * 10_000
    with pytest.raises(Undeliverable, match="msg too large"):
        list(sink.parts(message(b"x" * 200_000)))


def test_events_of_splunk_are_text_json_or_raw() -> None:
    url = {"splunk-url": "http://127.0.0.1:1", "splunk-token": "t", "splunk-index": "main"}
    inline = Splunk(url, FACTS).event(message(b"hello"))
    assert inline == {
        "event": {
            "line": "hello",
            "source": "stdout",
            "tag": "0123456789ab",
            "attrs": {"io.skep.one": "1", "_hidden": "two\nlines"},
        },
        "time": f"{MOMENT_NS / 1e9:f}",
        "host": "node",
        "index": "main",
    }
    raw = Splunk({**url, "splunk-format": "raw", "tag": ""}, FACTS)
    found = raw.event(message(b"hello"))
    assert found is not None
    assert found["event"] == "io.skep.one=1 _hidden=two\nlines hello"
    assert raw.event(message(b"  ")) is None


OWN = (
    "container_id",
    "container_name",
    "container_tag",
    "image_name",
    "message",
    "priority",
    "log",
    "source",
)


def test_no_label_passes_for_what_the_node_says_of_a_container() -> None:
    forged = {
        **dict.fromkeys(OWN, "forged"),
        "syslog_identifier": "sshd",
        "container_partial_message": "true",
    }
    facts = msgspec.structs.replace(FACTS, attributes={**forged, "io.skep.one": "1"})
    journal = Journald({}, facts).datagram(message(b"line"))
    plain = Journald({}, msgspec.structs.replace(FACTS, attributes={})).datagram(message(b"line"))
    found, expected = journal_fields(journal), journal_fields(plain)
    assert found.pop("IO_SKEP_ONE") == b"1"
    kept = {name: value for name, value in found.items() if value != b"forged"}
    assert {**kept, "CONTAINER_LOG_EPOCH": b""} == {**expected, "CONTAINER_LOG_EPOCH": b""}
    assert {name for name in found if name not in kept} == {"LOG", "SOURCE"}
    [gelf] = gelf_messages(
        list(
            Gelf({"gelf-address": "udp://127.0.0.1:1", "gelf-compression-type": "none"}, facts).parts(
                message(b"line")
            )
        )
    )
    assert (gelf["_container_name"], gelf["_image_name"]) == ("web", "busybox:1")
    [(_, _, record, _)] = fluentd_messages(Fluentd({}, facts).packed(message(b"line")))
    assert (record[b"container_name"], record[b"log"], record[b"source"]) == (b"/web", b"line", b"stdout")
