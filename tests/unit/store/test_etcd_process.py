"""The flags of the etcd process, and the interpretation of its log: pure parts of its supervision."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from structlog.testing import capture_logs

from skep.errors import FailedPrecondition, SkepError
from skep.store.etcd.errors import (
    Busy,
    Compacted,
    InvalidRequest,
    NotServing,
    OutOfSpace,
    Uncertain,
    error_of,
)
from skep.store.etcd.process import damage
from skep.store.etcd.process.binary import check_upgrade, check_version, find_binary
from skep.store.etcd.process.flags import MemberSettings, PeerFiles, arguments, environment
from skep.store.etcd.process.member import EtcdOutput
from tests.support.store.etcd_rig import member_settings


def settings(*, is_solo: bool = True) -> MemberSettings:
    files = PeerFiles(certificate=Path("/c/crt"), key=Path("/c/key"), roots=Path("/c/ca"))
    return MemberSettings(
        name="n1",
        directory=Path("/d"),
        socket=Path("/run/e.sock"),
        peer_listen="10.0.0.1:2378",
        peer_files=files,
        cluster_token="c1",
        is_solo=is_solo,
    )


def flags(version: tuple[int, int, int] = (3, 5, 30), *, is_solo: bool = True) -> dict[str, str]:
    given = (argument.removeprefix("--") for argument in arguments(settings(is_solo=is_solo), version))
    return dict(argument.split("=", 1) for argument in given)


def test_peers_speak_tls_with_certificates_of_managers_only():
    reported = flags()
    assert reported["listen-peer-urls"] == "https://10.0.0.1:2378"
    assert reported["initial-advertise-peer-urls"] == "https://n1:2378"
    assert reported["peer-client-cert-auth"] == "true"
    assert reported["peer-cert-allowed-hostname"] == "swarm-manager"
    assert not any(value.startswith("http://") for value in reported.values())
    assert reported["listen-client-urls"] == "unix:///run/e.sock"


def test_a_single_member_keeps_little_in_memory_and_ticks_rarely():
    timers = ("heartbeat-interval", "election-timeout")
    assert [flags()[timer] for timer in timers] == ["1000", "5000"]
    assert environment(settings()) == {"GOGC": "50"}
    assert [flags(is_solo=False)[timer] for timer in timers] == ["100", "500"]
    assert environment(settings(is_solo=False)) == {}


def test_a_sealed_off_member_has_a_short_election_timeout():
    sealed_off = replace(settings(), is_sealed_off=True)
    assert "--election-timeout=100" in arguments(sealed_off, (3, 5, 30))


def test_flags_are_those_of_the_minor_version():
    assert not [name for name in flags((3, 6, 14)) if name.startswith("experimental")]
    assert "experimental-initial-corrupt-check" in flags((3, 5, 16))


def test_fsync_is_on():
    assert "unsafe-no-fsync" not in flags()


def test_a_file_is_asked_for_its_version_once(tmp_path):
    """Another file in its place is asked again, though it has the same name and the same length."""
    etcd, asked, remembered = tmp_path / "etcd", tmp_path / "asked", tmp_path / "remembered.json"

    def put_in_place(version: str) -> None:
        beside = tmp_path / "beside"
        beside.write_text(f"#!/bin/sh\necho asked >>{asked}\necho 'etcd Version: {version}'\n")
        beside.chmod(0o755)
        beside.rename(etcd)

    put_in_place("3.5.30")
    assert [find_binary(etcd, remembered).version for _ in range(3)] == [(3, 5, 30)] * 3
    assert asked.read_text() == "asked\n"
    put_in_place("3.5.31")
    assert find_binary(etcd, remembered).version == (3, 5, 31)
    remembered.write_text("{")
    assert find_binary(etcd, remembered).version == (3, 5, 31)
    put_in_place("3.5.01")
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="too old"):
            find_binary(etcd, remembered)


@given(st.tuples(st.integers(3, 4), st.integers(0, 8), st.integers(0, 40)))
def test_only_versions_that_keep_data_are_accepted(version):
    is_good = version >= (3, 5, 16) and not (3, 6, 0) <= version < (3, 6, 5)
    try:
        check_version(Path("etcd"), version)
    except FailedPrecondition:
        assert not is_good
    else:
        assert is_good


@pytest.mark.parametrize(
    ("served_by", "version", "is_allowed"),
    [
        (None, (3, 6, 9), True),
        ((3, 5, 16), (3, 5, 30), True),
        ((3, 5, 30), (3, 5, 16), True),
        ((3, 5, 16), (3, 6, 9), False),
        ((3, 5, 24), (3, 6, 9), True),
        ((3, 6, 9), (3, 5, 30), False),
        ((3, 5, 30), (3, 7, 0), False),
    ],
)
def test_minor_versions_change_one_step_at_a_time_and_upwards(served_by, version, is_allowed):
    if is_allowed:
        check_upgrade(served_by, version)
    else:
        with pytest.raises(FailedPrecondition):
            check_upgrade(served_by, version)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("etcdserver: leader changed", Uncertain),
        ("etcdserver: no leader", Uncertain),
        ("etcdserver: request timed out", Uncertain),
        ("etcdserver: request timed out, possibly due to previous leader failure", Uncertain),
        ("etcdserver: too many requests", Busy),
        ("etcdserver: mvcc: database space exceeded", OutOfSpace),
        ("etcdserver: rpc not supported for learner", NotServing),
        ("etcdserver: mvcc: required revision has been compacted", Compacted),
        ("etcdserver: mvcc: required revision is a future revision", Compacted),
        ("etcdserver: duplicate key given in txn request", InvalidRequest),
        ("etcdserver: request is too large", InvalidRequest),
        ("etcdserver: too many operations in txn request", InvalidRequest),
        ("raft proposal dropped", Busy),
        ("etcdserver: not leader", Uncertain),
        ("a sentence of a later etcd", Uncertain),
        ("", Uncertain),
    ],
)
def test_a_refusal_is_translated_by_its_text(text: str, meaning: type[SkepError]):
    assert type(error_of(text)) is meaning


def output_at(seconds: Callable[[], float] = lambda: 0.0) -> EtcdOutput:
    """The reader of a process's stderr, with this clock."""
    return EtcdOutput(seconds)


def test_lines_are_logged_with_their_level_and_details():
    with capture_logs() as logs:
        output_at().take(b'{"level":"warn","ts":"t","caller":"c","msg":"slow fdatasync","took":"1.2s"}\n')
        output_at().take(b"plain words\n")
        output_at().take(b'{"level":"warn","msg":"Running http and grpc server on single port"}\n')
        for error in ("EOF", "tls: bad certificate"):
            output_at().take(
                b'{"level":"warn","msg":"rejected connection on peer endpoint","error":"%b"}\n'
                % error.encode()
            )
    assert logs == [
        {"log_level": "warning", "event": "slow fdatasync", "etcd_took": "1.2s"},
        {"log_level": "warning", "event": "etcd output", "line": "plain words"},
        {
            "log_level": "warning",
            "event": "rejected connection on peer endpoint",
            "etcd_error": "tls: bad certificate",
        },
    ], "port probes of other managers are not logged"


def test_a_warning_about_a_peer_that_repeats_is_counted_instead_of_logged():
    """Of a manager that joins and does not listen yet, etcd warns 70 times a second."""
    now = 0.0
    output = output_at(lambda: now)

    def warn(peer: str, error: str = "connection refused") -> None:
        line = {
            "level": "warn",
            "msg": "failed to send database snapshot",
            "remote-peer-id": peer,
            "error": error,
        }
        output.take(json.dumps(line).encode())

    with capture_logs() as logs:
        for _ in range(285):
            warn("m2")
        warn("m3")
        warn("m2", error="i/o timeout")
        now = 10.0
        warn("m2")
    assert [(line["etcd_remote_peer_id"], line["etcd_error"], line.get("repeated")) for line in logs] == [
        ("m2", "connection refused", None),
        ("m3", "connection refused", None),
        ("m2", "i/o timeout", None),
        ("m2", "connection refused", 284),
    ]


@given(st.lists(st.tuples(st.integers(0, 150), st.floats(0, 20)), max_size=400))
def test_whatever_repeats_every_warning_is_logged_or_counted_within_its_time(warnings):
    now, logged = 0.0, dict[str, float]()
    output = output_at(lambda: now)
    for number, pause in warnings:
        now += pause
        with capture_logs() as logs:
            output.take(b'{"level":"warn","msg":"%d"}' % number)
        assert logs or now < logged[str(number)] + 10
        logged |= {line["event"]: now for line in logs}


def test_the_reason_is_the_fatal_line_else_the_panic_else_the_last_line():
    output = output_at()
    assert output.reason == "no output"
    output.take(b'{"level":"warn","msg":"something"}')
    assert output.reason == "something"
    output.take(b"panic: index out of range\n")
    output.take(b"goroutine 1 [running]:\n")
    assert output.reason == "panic: index out of range"
    output.take(b'{"level":"fatal","msg":"discovery failed","error":"crc mismatch"}')
    assert output.reason == "discovery failed: crc mismatch"


@given(st.binary(max_size=100))
def test_no_output_confuses_the_reader(line):
    with capture_logs():
        output_at().take(line)


@pytest.mark.parametrize(
    ("reason", "is_damage"),
    [
        ("walpb: crc mismatch", True),
        ("wal: max entry size limit exceeded", True),
        ("failed to save: wal: write /x/0.wal: no space left on device", False),
        ("failed to open database: open /x/db: too many open files", False),
    ],
)
def test_a_disk_without_room_is_no_damage(reason: str, is_damage: bool, tmp_path: Path):
    assert (damage.damage_reported(reason, tmp_path) is not None) is is_damage


def test_the_quota_is_the_one_of_the_settings(tmp_path: Path):
    settings = replace(member_settings(tmp_path), quota_bytes=123456789)
    assert "--quota-backend-bytes=123456789" in arguments(settings, (3, 5, 30))
