"""Files of a container's output: rotation with compression, and going on where a reader has stopped."""

import gzip
from pathlib import Path

import pytest

from skep.aio.time_slices import run_at_once
from skep.engine.containers.container import LogConfig
from skep.engine.logs.log_files import (
    LogPosition,
    LogReader,
    compress,
    generations,
    identity,
    lines_in,
    rotate,
)

STAMP = "2026-01-31T12:00:00.{:09d}+00:00"


def lines_from(files: LogReader) -> list[str]:
    found: list[str] = []
    while lines := run_at_once(files.read_lines()):
        found += [line.decode().rsplit(" ", 1)[1] for line in lines]
    return found


def written(current: Path, *numbers: int) -> None:
    with open(current, "a") as file:
        file.writelines(f"{STAMP.format(number)} stdout F {number}\n" for number in numbers)


def rotated(current: Path) -> None:
    assert rotate(current, LogConfig(max_size_bytes=1, max_files=4), current.touch)
    compress(current)


def names(current: Path) -> list[str]:
    return [path.name for path in generations(current)]


def test_what_conmon_has_left_is_compressed_and_read_all_the_same(tmp_path: Path) -> None:
    current = tmp_path / "current"
    written(current, 1, 2)
    rotated(current)
    written(current, 3, 4)
    rotated(current)
    written(current, 5)
    assert names(current) == ["current.2.gz", "current.1.gz", "current"]
    files = LogReader(current)
    assert lines_from(files) == ["1", "2", "3", "4", "5"]
    assert run_at_once(files.open_for_tail(2))
    assert lines_from(files)[-2:] == ["4", "5"]
    files.close()


def test_a_reader_goes_on_after_its_file_was_renamed_and_compressed(tmp_path: Path) -> None:
    current = tmp_path / "current"
    written(current, 1, 2)
    files = LogReader(current)
    assert lines_from(files) == ["1", "2"]
    written(current, 3)
    rotated(current)
    written(current, 4)
    assert lines_from(files) == ["3", "4"], "not from the beginning of the compressed file"
    files.close()


def test_a_copy_reads_the_same_lines_after_the_file_was_rotated_away(tmp_path: Path) -> None:
    current = tmp_path / "current"
    written(current, 1, 2, 3)
    files = LogReader(current)
    assert run_at_once(files.open_for_tail(2))
    copy = files.copy()
    current.unlink()
    written(current, 4)
    for one in (copy, files):
        assert lines_from(one) == ["2", "3", "4"]
        one.close()


def test_a_later_reader_goes_on_where_an_earlier_one_stopped(tmp_path: Path) -> None:
    current = tmp_path / "current"
    written(current, 1, 2)
    first = LogReader(current)
    assert lines_from(first) == ["1", "2"]
    position = first.position
    first.close()
    written(current, 3)
    rotated(current)
    written(current, 4)
    later = LogReader(current)
    assert later.open_at(position)
    assert lines_from(later) == ["3", "4"]
    later.close()


def test_a_place_that_was_rotated_away_is_not_found(tmp_path: Path) -> None:
    current = tmp_path / "current"
    written(current, 1)
    files = LogReader(current)
    assert not files.open_at(LogPosition(b"2020-01-01T00:00:00.000000000+00:00 stdout F 0", 5))
    assert lines_from(files) == ["1"], "what is left is read"
    files.close()


def test_an_attempt_to_compress_that_was_cut_off_leaves_no_line_twice(tmp_path: Path) -> None:
    current = tmp_path / "current"
    written(current, 1)
    rotated(current)
    packed = (tmp_path / "current.1.gz").read_bytes()
    written(current, 2)
    assert rotate(current, LogConfig(max_size_bytes=1, max_files=4), current.touch)
    (tmp_path / "current.1.gz").write_bytes(packed[:10])  # beside current.1, which it is of
    assert names(current) == ["current.2.gz", "current.1", "current"]
    written(current, 3)
    rotated(current)
    files = LogReader(current)
    assert lines_from(files) == ["1", "2", "3"]
    files.close()


def test_an_empty_compressed_file_is_passed_over(tmp_path: Path) -> None:
    current = tmp_path / "current"
    written(current, 1)
    rotated(current)
    written(current, 2)
    rotated(current)
    written(current, 3)
    for content in (b"", gzip.compress(b"")):  # what a power loss leaves
        (tmp_path / "current.1.gz").write_bytes(content)
        files = LogReader(current)
        assert lines_from(files) == ["1", "3"]
        files.close()


@pytest.mark.parametrize("at", ["head", "middle", "checksum", "end"])
def test_what_is_left_of_a_damaged_file_is_read_and_what_follows_it(tmp_path: Path, at: str) -> None:
    current = tmp_path / "current"
    written(current, 1, 2)
    rotated(current)
    written(current, 3)
    packed = tmp_path / "current.1.gz"
    content = bytearray(packed.read_bytes())
    if at == "end":
        del content[-9:]
    else:
        content[{"head": 0, "middle": -16, "checksum": -5}[at]] ^= 0xFF
    packed.write_bytes(content)
    files = LogReader(current)
    found = lines_from(files)
    assert found[-1] == "3"
    assert found == ["1", "2", "3"] if at == "checksum" else set(found) <= {"1", "2", "3"}
    assert files.damage.startswith("current.1.gz: ")
    files.close()
    assert identity(packed) in (b"", f"{STAMP.format(1)} stdout F 1".encode())
    assert lines_in(packed) <= 2
