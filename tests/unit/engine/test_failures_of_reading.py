"""Whichever call on a file fails while something is read: its reader ends or goes without, the next one is whole."""

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from skep.engine.confinement.cdi import described
from skep.engine.containers.container import LogConfig, LogFilter
from skep.engine.log_drivers.spool import Spool
from skep.engine.logs import logs
from skep.engine.logs.log_files import rotate
from tests.support.file_faults import Faults, walk
from tests.unit.engine.test_cdi import a_file

LINES = [f"line {number}\n".encode() for number in range(30)]
CALLS_MIN = 5
"""A walk with fewer calls has missed what it is about."""


def a_log(directory: Path) -> Path:
    """A log of three generations."""
    current = directory / "ctr.log"
    for path, part in zip((f"{current}.2", f"{current}.1", current), range(3), strict=True):
        lines = LINES[part * 10 : part * 10 + 10]
        Path(path).write_bytes(b"".join(b"2026-01-01T00:00:00.000000000Z stdout F " + line for line in lines))
    return current


async def read(current: Path, *, follow: bool, tail: int | None) -> list[bytes]:
    """The lines up to the end of the container, which comes when all of them were read."""
    found: list[bytes] = []
    ended = asyncio.Event()

    async def wait_ended() -> None:
        await ended.wait()

    wanted = len(LINES) if tail is None else tail
    filter = LogFilter(follow=follow, tail=tail)
    entries = logs.singly(logs.read(current, filter, has_ended=ended.is_set, wait_ended=wait_ended))
    async for entry in entries:
        found.append(entry.data)
        if len(found) == wanted:
            ended.set()
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_reader_of_a_log_gets_all_lines_or_the_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    for follow in (False, True):
        for tail in (None, 15):
            wanted = LINES if tail is None else LINES[-tail:]

            async def life(
                place: Path,
                faults: Faults,
                follow: bool = follow,
                tail: int | None = tail,
                wanted: list[bytes] = wanted,
            ) -> None:
                before = descriptors()
                lines: list[bytes] | None = None
                with suppress(OSError):
                    lines = await read(place / "ctr.log", follow=follow, tail=tail)
                assert lines in (None, wanted), "lines are missing without an error"
                assert descriptors() == before
                faults.end()
                assert await read(place / "ctr.log", follow=follow, tail=tail) == wanted

            template = tmp_path / "template"
            template.mkdir(exist_ok=True)
            a_log(template)
            calls = await walk(tmp_path / f"{follow}-{tail}", life, template=template)
            assert calls >= CALLS_MIN


async def test_descriptions_of_devices_that_cannot_be_read_leave_the_others(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        directories = (place / "etc", place / "run")
        found = set(described(directories))
        assert found <= {"acme.com/gpu=0", "acme.com/net=0", "acme.com/fpga=0"}
        assert found, "one call that fails costs one file or one directory"
        faults.end()
        assert set(described(directories)) == {"acme.com/gpu=0", "acme.com/net=0", "acme.com/fpga=0"}

    template = tmp_path / "template"
    template.mkdir()
    a_file(template / "etc", "gpu.json")
    a_file(template / "etc", "net.json", kind="acme.com/net")
    a_file(template / "run", "fpga.json", kind="acme.com/fpga")
    assert await walk(tmp_path / "lives", life, template=template) >= CALLS_MIN


async def test_a_log_is_rotated_or_stays_whichever_call_fails(tmp_path: Path) -> None:
    """No line is lost while there is room for another file; the writer has a file in the end."""

    async def life(place: Path, faults: Faults) -> None:
        current = place / "ctr.log"
        config = LogConfig(max_size_bytes=1, max_files=4)
        with suppress(OSError):
            rotate(current, config, current.touch)
        faults.end()
        rotate(current, config, current.touch)
        assert await read(current, follow=False, tail=None) == LINES
        assert current.exists()

    template = tmp_path / "template"
    template.mkdir()
    a_log(template)
    await walk(tmp_path / "lives", life, template=template)


async def test_a_sender_of_logs_sends_no_line_twice_and_leaves_none_out(tmp_path: Path) -> None:
    """It is begun again, after a third of the lines."""

    def sent(spool: Spool, faults: Faults) -> list[bytes]:
        found = []
        while True:
            try:
                messages = spool.read()
            except OSError:
                faults.end()
                continue
            if not messages:
                return found
            found += [one.line + b"\n" for one in messages]

    template = tmp_path / "template"
    template.mkdir()
    current = a_log(template)
    first = Spool(current)
    first.open()
    assert len(first.read()) == 10
    assert first.position is not None
    first.save(first.position)
    first.close()

    async def life(place: Path, faults: Faults) -> None:
        before = descriptors()
        spool = Spool(place / "ctr.log")
        try:
            spool.open()
        except OSError:
            faults.end()
            spool.open()
        assert sent(spool, faults) == LINES[10:]
        spool.close()
        assert descriptors() == before

    assert await walk(tmp_path / "lives", life, template=template) >= CALLS_MIN
