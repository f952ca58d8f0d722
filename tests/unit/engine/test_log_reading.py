"""Reading large logs: in bounded pieces and threads of their own, ended with their reader, in bounded memory."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import pytest

from skep.aio.time_slices import run_at_once
from skep.engine.containers.container import LogConfig, LogEntry, LogFilter, StandardStream
from skep.engine.logs import logs
from skep.engine.logs.log_files import SLICE_BYTES, Assembler, LogReader, compress, rotate

SECOND_NS = 1_000_000_000
BEGAN_NS = 1_769_860_800 * SECOND_NS
NEVER = LogFilter(since_ns=BEGAN_NS + 10**6 * SECOND_NS)
"""Wants no line of these logs."""
PIECE_BYTES_MAX = 5 << 20
LARGE_BYTES = 12 << 20
STREAMS = (StandardStream.STDOUT, StandardStream.STDOUT, StandardStream.STDERR)


def line(number: int, text: str = "", *, kind: str = "F") -> bytes:
    """Of the ``number``-th second; every third one is of the standard error."""
    minute, second = divmod(number % 3600, 60)
    stream = STREAMS[number % 3].name.lower()
    return f"2026-01-31T12:{minute:02}:{second:02}.000000000+00:00 {stream} {kind} {number} {text}\n".encode()


def a_large_log(directory: Path, size_bytes: int = LARGE_BYTES) -> Path:
    current = directory / "ctr.log"
    directory.mkdir(exist_ok=True)
    part = b"".join(line(number, "x" * 950) for number in range(1000))
    current.write_bytes(part * (size_bytes // len(part) + 1))
    return current


def reading(
    current: Path, filter: LogFilter, has_ended: Callable[[], bool] = lambda: True
) -> AsyncGenerator[Sequence[LogEntry], None]:
    async def wait_ended() -> None:
        """It has."""

    return logs.read(current, filter, has_ended=has_ended, wait_ended=wait_ended)


async def entries_of(current: Path, filter: LogFilter) -> list[LogEntry]:
    return [entry async for entry in logs.singly(reading(current, filter))]


def offset_in(path: Path) -> int:
    """Of this process's descriptors of ``path``, the one that was read furthest."""
    found = [0]
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
                found.append(int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split()[1]))
        except FileNotFoundError:
            continue  # the directory's own
    return max(found)


async def test_what_is_written_at_the_end_is_read_once_more_by_who_catches_up(tmp_path: Path) -> None:
    current = tmp_path / "ctr.log"
    current.write_bytes(line(1))
    found: list[list[bytes]] = []
    async for entries in reading(current, LogFilter(catches_up=True), lambda: False):
        found.append([entry.data for entry in entries])
        if not entries:
            with current.open("ab") as file:
                file.write(line(2))
    assert found == [[b"1 \n"], [], [b"2 \n"]]


async def test_a_call_of_a_thread_reads_a_bounded_piece_however_few_lines_are_wanted(tmp_path: Path) -> None:
    current = a_large_log(tmp_path)
    offsets = []

    def has_ended() -> bool:  # asked before each call
        offsets.append(offset_in(current))
        return True

    async for batch in reading(current, NEVER, has_ended):
        assert not batch
    assert len(offsets) > LARGE_BYTES / PIECE_BYTES_MAX
    steps = [after - before for before, after in pairwise(offsets)]
    assert max(steps) <= PIECE_BYTES_MAX


@pytest.mark.parametrize("case", ["tail since", "whole tail", "compressed"])
async def test_a_tail_and_a_compressed_file_are_read_in_bounded_pieces_too(tmp_path: Path, case: str) -> None:
    current = a_large_log(tmp_path)
    filter = NEVER
    if case == "compressed":
        rotate(current, LogConfig(max_size_bytes=1, max_files=3), current.touch)
        compress(current)
    else:
        filter = LogFilter(tail=999_999_999, since_ns=NEVER.since_ns if case == "tail since" else 0)
    calls = 0

    def has_ended() -> bool:
        nonlocal calls
        calls += 1
        return True

    entries = 0
    async for batch in reading(current, filter, has_ended):
        entries += len(batch)
    assert entries == (current.read_bytes().count(b"\n") if case == "whole tail" else 0)
    # It is looked through from its end and read, or unpacked and read.
    assert calls > 2 * LARGE_BYTES / PIECE_BYTES_MAX


async def test_a_large_tail_is_not_held_as_a_whole(tmp_path: Path) -> None:
    current = a_large_log(tmp_path, 4 << 20)
    total = current.read_bytes().count(b"\n")
    for tail in (999_999_999, total - 7):
        batches = [batch async for batch in reading(current, LogFilter(tail=tail))]
        assert sum(map(len, batches)) == min(tail, total)
        assert max(map(len, batches)) < 1500
        assert batches[0][0].data.startswith(b"0 " if tail > total else b"7 ")


@pytest.mark.parametrize("slices", [14, 15, 16, 17])
async def test_a_tail_until_a_moment_is_whole_wherever_a_piece_ends(tmp_path: Path, slices: int) -> None:
    """The log is looked through slice by slice from its end; its first slice has the moment."""
    current = a_large_log(tmp_path, 5 << 20)
    os.truncate(current, slices * SLICE_BYTES)
    filter = LogFilter(tail=999_999_999, until_ns=BEGAN_NS + 3 * SECOND_NS)
    found = await entries_of(current, filter)
    assert [one.data.split()[0] for one in found] == [b"0", b"1", b"2", b"3"]


async def test_other_work_in_threads_goes_on_while_more_logs_are_read_than_there_are_threads(
    tmp_path: Path,
) -> None:
    """Their disk is silent: each is a pipe that nobody has written to yet."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    pipes = [tmp_path / f"{number}" / "ctr.log" for number in range(4)]
    for pipe in pipes:
        pipe.parent.mkdir()
        os.mkfifo(pipe)
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(entries_of(pipe, LogFilter())) for pipe in pipes]
        await asyncio.sleep(0)  # each has asked for its first piece
        try:
            async with asyncio.timeout(20):
                assert await asyncio.to_thread(threading.active_count)
            assert not any(reader.done() for reader in readers)
        finally:  # a writer ends them, whatever threads they are in
            writers = ThreadPoolExecutor(len(pipes))
            for pipe in pipes:
                writers.submit(pipe.write_bytes, line(1))
    assert [[one.data for one in reader.result()] for reader in readers] == [[b"1 \n"]] * 4


async def test_a_log_is_read_while_all_shared_threads_are_taken(tmp_path: Path) -> None:
    current = tmp_path / "ctr.log"
    current.write_bytes(line(1))
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    is_read = threading.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(is_read.wait))
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(20):
                assert [one.data for one in await entries_of(current, LogFilter())] == [b"1 \n"]
        finally:
            is_read.set()


async def test_a_small_log_is_read_before_large_ones_that_began_earlier(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    large = a_large_log(tmp_path / "large", 20 << 20)
    small = tmp_path / "ctr.log"
    small.write_bytes(line(1))
    ended: list[str] = []

    async def read(name: str, current: Path, filter: LogFilter) -> None:
        await entries_of(current, filter)
        ended.append(name)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(read("large", large, NEVER))
        group.create_task(read("small", small, LogFilter()))
    assert ended == ["small", "large", "large", "large"]


def bytes_read_from(writer: int, most: int) -> int:
    """How much a reader takes out of a pipe before it closes it; at least ``most``: it does not."""
    part, written = b"".join(line(number) for number in range(1000)), 0
    try:
        while written < most:
            written += os.write(writer, part)
    except BrokenPipeError:
        pass
    finally:
        os.close(writer)
    return written


async def test_a_thread_whose_reader_has_gone_stops_and_opens_nothing_again(tmp_path: Path) -> None:
    """It waits for a pipe when its reader goes.  The pipe breaks when the thread closes it."""
    pipe = tmp_path / "ctr.log"
    os.mkfifo(pipe)

    async def read() -> None:
        async with aclosing(reading(pipe, NEVER)) as batches:
            async for _ in batches:
                pass

    reader = asyncio.create_task(read())
    writer = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)  # returns when the thread has opened it
    reader.cancel()
    await asyncio.wait((reader,))
    assert bytes_read_from(writer, most=4 * PIECE_BYTES_MAX) <= PIECE_BYTES_MAX


def test_files_that_were_closed_give_no_lines(tmp_path: Path) -> None:
    current = tmp_path / "ctr.log"
    current.write_bytes(line(1) + line(2))
    files = LogReader(current)
    assert len(run_at_once(files.read_lines())) == 2
    files.close()
    assert run_at_once(files.read_lines()) == []
    assert not files.is_open


FILTERS = [
    LogFilter(streams=streams, tail=tail, since_ns=since, until_ns=until)
    for streams in (frozenset(StandardStream), frozenset({StandardStream.STDERR}))
    for tail in (None, 0, 1, 7, 60, 999_999_999)
    for since in (0, BEGAN_NS + 80 * SECOND_NS)
    for until in (0, BEGAN_NS + 85 * SECOND_NS)
]


@pytest.mark.parametrize("filter", FILTERS)
async def test_what_is_wanted_of_a_rotated_log_comes_in_its_order(tmp_path: Path, filter: LogFilter) -> None:
    """Some lines are in pieces; the last one has no end."""
    lines: list[bytes] = []
    for number in range(120):
        lines += [line(number, kind="P")] if number % 10 in (1, 4) else []
        lines += [line(number)]
    lines += [line(120, kind="P")]
    current = tmp_path / "ctr.log"
    for start in (0, 50, 100):
        if start:
            rotate(current, LogConfig(max_size_bytes=1, max_files=4), current.touch)
            compress(current)
        current.write_bytes(b"".join(lines[start : start + 50 if start < 100 else None]))
    assembler = Assembler()
    parsed = assembler.feed([one.removesuffix(b"\n") for one in lines])
    past = [one for one in parsed if not filter.until_ns or one.timestamp_ns <= filter.until_ns]
    wanted = [one for one in past if one.stream in filter.streams and one.timestamp_ns >= filter.since_ns]
    kept = wanted if filter.tail is None else wanted[max(len(wanted) - filter.tail, 0) :]
    # Of a tail of none only the last line is read.
    is_over = len(past) < len(parsed) and filter.tail != 0
    rest = [] if is_over else [one for one in assembler.finish() if one.stream in filter.streams]
    assert await entries_of(current, filter) == [*kept, *rest]
