"""Logs, ps, hosts files and counters: text in, objects out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.containers.container import LogConfig, LogEntry, StandardStream
from skep.engine.containers.signals import signal_number
from skep.engine.logs.log_files import PIECE_BYTES_MAX, Assembler, generations, rotate
from skep.engine.metrics.stats import NetworkStats, flat_keyed, network_counters
from skep.engine.metrics.top import parse
from skep.errors import InvalidArgument
from skep.linux.name_files import forwarded_to, hosts_file, resolver_file, sets_ndots

STAMP = b"2026-01-31T12:00:00.123456789+00:00"
STAMP_NS = 1_769_860_800_123_456_789


def entries(*lines: bytes) -> list[LogEntry]:
    assembler = Assembler()
    return [*assembler.feed(lines), *assembler.finish()]


def test_a_line_has_its_time_stream_and_newline() -> None:
    assert entries(STAMP + b" stdout F hello  world") == [
        LogEntry(STAMP_NS, StandardStream.STDOUT, b"hello  world\n")
    ]


def test_pieces_are_joined_per_stream() -> None:
    assert entries(
        STAMP + b" stdout P one ",
        STAMP + b" stderr F other",
        STAMP + b" stdout P two ",
        STAMP + b" stdout F three",
    ) == [
        LogEntry(STAMP_NS, StandardStream.STDERR, b"other\n"),
        LogEntry(STAMP_NS, StandardStream.STDOUT, b"one two three\n"),
    ]


def test_an_endless_line_is_given_out_in_pieces() -> None:
    piece = b"x" * 8000
    found = entries(*(STAMP + b" stdout P " + piece for _ in range(10)))
    assert b"".join(entry.data for entry in found) == piece * 10 + b"\n"
    assert [len(entry.data) for entry in found] == [PIECE_BYTES_MAX] * 4 + [80_000 % PIECE_BYTES_MAX + 1]


def test_what_was_not_ended_becomes_a_line() -> None:
    assert entries(STAMP + b" stdout P half")[0].data == b"half\n"


@given(st.lists(st.binary(max_size=60)))
def test_no_content_of_a_log_file_can_break_the_reader(lines: list[bytes]) -> None:
    entries(*lines)


@given(st.lists(st.binary(max_size=20).filter(lambda data: b"\n" not in data)))
def test_bytes_are_kept_verbatim(texts: list[bytes]) -> None:
    assert [entry.data for entry in entries(*(STAMP + b" stdout F " + text for text in texts))] == [
        text + b"\n" for text in texts
    ]


def test_rotation_renames_and_forgets_the_oldest(tmp_path: Path) -> None:
    current = tmp_path / "current"
    config = LogConfig(max_size_bytes=3, max_files=3)
    reopened = []
    for number in range(5):
        current.write_text(f"{number}---")
        assert rotate(current, config, lambda: reopened.append(current))
    current.write_text("5")
    assert not rotate(current, config, lambda: reopened.append(current))
    assert [path.read_text() for path in generations(current)] == ["3---", "4---", "5"]
    assert len(reopened) == 5


def test_a_log_that_is_to_have_fewer_files_loses_the_oldest(tmp_path: Path) -> None:
    current = tmp_path / "current"
    for number in range(1, 6):
        (tmp_path / f"current.{number}").write_text(str(number))
    current.write_text("0---")
    assert rotate(current, LogConfig(max_size_bytes=4, max_files=3), current.touch)
    assert [path.read_text() for path in generations(current)] == ["1", "0---", ""]


def test_a_log_without_a_bound_is_never_rotated(tmp_path: Path) -> None:
    current = tmp_path / "current"
    current.write_text("x" * 100)
    assert not rotate(current, LogConfig(), lambda: None)


def test_only_files_of_the_log_are_its_generations(tmp_path: Path) -> None:
    for name in ("current", "current.1", "current.10", "current.2", "current.tmp", "other.1"):
        (tmp_path / name).touch()
    names = [path.name for path in generations(tmp_path / "current")]
    assert names == ["current.10", "current.2", "current.1", "current"]


def test_ps_rows_are_chosen_by_pid_and_the_command_keeps_its_blanks() -> None:
    output = "UID   PID CMD\nroot    1 init\nroot   22 sh -c  sleep 1\nroot  333 other\n"
    found = parse(output, {22, 333})
    assert found.titles == ("UID", "PID", "CMD")
    assert found.processes == (("root", "22", "sh -c  sleep 1"), ("root", "333", "other"))


def test_ps_output_without_pids_is_refused_with_dockers_words() -> None:
    with pytest.raises(InvalidArgument, match="Couldn't find PID field in ps output"):
        parse("COMMAND\nsh\n", {1})


def test_the_hosts_file_names_the_container_and_extra_hosts() -> None:
    lines = hosts_file("web", ("172.18.0.2",), ("10.0.0.1 a b", "malformed")).splitlines()
    assert lines[0] == "127.0.0.1\tlocalhost"
    assert lines[-2:] == ["10.0.0.1\ta b", "172.18.0.2\tweb"]


def test_name_servers_of_the_loopback_are_of_no_use_in_a_container() -> None:
    node = "# c\nnameserver 127.0.0.53\nnameserver ::1\nsearch example.org\noptions edns0\n"
    assert resolver_file(node, (), (), ()) == (
        "search example.org\nnameserver 8.8.8.8\nnameserver 8.8.4.4\noptions edns0\n"
    )
    assert resolver_file("nameserver 192.0.2.1\n", (), (), ()) == "nameserver 192.0.2.1\n"


def test_the_users_resolver_settings_replace_the_nodes() -> None:
    node = "nameserver 192.0.2.1\nsearch a\noptions b\n"
    assert resolver_file(node, ("192.0.2.9",), (".",), ("c",)) == "nameserver 192.0.2.9\noptions c\n"


@pytest.mark.parametrize("name", ["SIGTERM", "TERM", "term", "15", " 15 "])
def test_signals_are_known_by_name_and_number(name: str) -> None:
    assert signal_number(name) == 15


def test_real_time_signals_are_counted_from_the_first() -> None:
    assert signal_number("RTMIN+3") == signal_number("SIGRTMIN+3") == signal_number("RTMIN") + 3


@pytest.mark.parametrize("name", ["", "NONSENSE", "0", "-9", "99", "RTMIN+99", "RTMIN+x"])
def test_other_words_are_no_signal(name: str) -> None:
    with pytest.raises(InvalidArgument, match="Invalid signal"):
        signal_number(name)


def test_counters_are_read_from_the_kernels_files() -> None:
    text = (
        "Inter-|\n face |\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12\n  eth0: 1 2 3 4 0 0 0 0 9 10 11 12 0 0 0 0\n"
    )
    assert network_counters(text) == {
        "eth0": NetworkStats(
            rx_bytes=1,
            rx_packets=2,
            rx_errors=3,
            rx_dropped=4,
            tx_bytes=9,
            tx_packets=10,
            tx_errors=11,
            tx_dropped=12,
        )
    }
    assert flat_keyed("a 1\nb x\nc 3 4\nd 5\n") == {"a": 1, "d": 5}


def test_a_container_on_networks_uses_the_name_server_in_its_namespace() -> None:
    node = "nameserver 127.0.0.53\nnameserver 192.0.2.1\nsearch example.com\noptions edns0\n"
    named = resolver_file(node, (), (), (), is_named=True)
    assert named == "search example.com\nnameserver 127.0.0.11\noptions edns0 ndots:0\n"
    assert forwarded_to(node, ()) == ("127.0.0.53", "192.0.2.1"), "the node's own may be on its loopback"
    assert forwarded_to(node, ("192.0.2.9",)) == ("192.0.2.9",)
    chosen = resolver_file(node, ("192.0.2.9",), ("a", "b"), ("ndots:2",), is_named=True)
    assert chosen == "search a b\nnameserver 127.0.0.11\noptions ndots:2\n"
    assert sets_ndots(node, ("ndots:2",))
    assert not sets_ndots(node, ())
    assert not sets_ndots(node, ("ndots:0",))
    senseless = resolver_file(node, (), ("a",), ("ndots:x", "rotate"), is_named=True)
    assert senseless == "search a\nnameserver 127.0.0.11\noptions rotate ndots:0\n"
