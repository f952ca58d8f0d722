"""The last contact of a node with a manager, over restarts of its process."""

from pathlib import Path

from skep.agent.session.last_seen import LastSeenFile


def test_the_next_process_reads_it(tmp_path: Path) -> None:
    LastSeenFile(tmp_path / "heard", lambda: 100.0, "one").record(2.0)
    assert LastSeenFile(tmp_path / "heard", lambda: 130.0, "one").silence_s() == 32.0


def test_after_a_reboot_the_silence_has_no_end(tmp_path: Path) -> None:
    LastSeenFile(tmp_path / "heard", lambda: 100.0, "one").record(0.0)
    assert LastSeenFile(tmp_path / "heard", lambda: 130.0, "two").silence_s() == float("inf")


def test_a_damaged_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "heard").write_text("{")
    received = LastSeenFile(tmp_path / "heard", lambda: 5.0, "one")
    assert received.silence_s() == float("inf")
    received.record(1.0)
    assert received.silence_s() == 1.0


def test_a_full_disk_costs_only_the_memory_of_it(tmp_path: Path) -> None:
    received = LastSeenFile(tmp_path / "missing" / "heard", lambda: 5.0, "one")
    received.record(1.0)
    assert received.silence_s() == 1.0
