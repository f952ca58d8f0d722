"""Limits and overflows of the kernel's tables of neighbors."""

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.netns.kernel.neighbor_tables import (
    CALM_SECONDS,
    LIMITS,
    WATCH_SECONDS,
    NeighborTables,
    at_machine,
    overflows,
    raised,
)
from skep.model.node import EngineDescription, NodeDescription
from skep.model.node_reports.conditions import ConditionName, condition_label, network_conditions
from skep.node.host.conditions import Conditions
from tests.support.file_faults import file_faults

HEAD = (
    "entries allocs destroys hash_grows lookups hits res_failed rcv_m rcv_u periodic forced unres table_fulls"
)
LINE = "00000003 00000001 00000000 00000000 0 0 0 0 0 0 0 0 {:08x}"


def limits(root: Path, version: str, **values: int) -> Path:
    folder = root / version / "neigh/default"
    folder.mkdir(parents=True)
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")
    return folder


def test_limits_are_raised_and_never_lowered(tmp_path: Path) -> None:
    low = limits(tmp_path, "ipv4", gc_thresh1=128, gc_thresh2=512, gc_thresh3=1024)
    high = limits(tmp_path, "ipv6", gc_thresh1=10**6, gc_thresh2=512, gc_thresh3=10**6)
    assert raised(tmp_path) == ""
    assert {one.name: int(one.read_text()) for one in low.iterdir()} == LIMITS
    assert {one.name: int(one.read_text()) for one in high.iterdir()} == {
        "gc_thresh1": 10**6,
        "gc_thresh2": LIMITS["gc_thresh2"],
        "gc_thresh3": 10**6,
    }


def test_a_limit_that_may_not_be_raised_is_named(tmp_path: Path) -> None:
    limits(tmp_path, "ipv4", gc_thresh1=10**6, gc_thresh2=10**6, gc_thresh3=1024)
    refused = tmp_path / "ipv4/neigh/default/gc_thresh3"
    opened: list[str] = []

    def is_written(call: str, path: Path) -> bool:
        """It is read first."""
        if call == "open" and path == refused:
            opened.append(call)
        return len(opened) == 2 and path == refused

    with file_faults(tmp_path) as faults:
        faults.choose(errno.EACCES, is_written)
        assert raised(tmp_path) == f"{refused}: Permission denied"


def test_overflows_of_all_processors_and_both_versions_are_counted(tmp_path: Path) -> None:
    (tmp_path / "arp_cache").write_text("\n".join([HEAD, LINE.format(1), LINE.format(16), ""]))
    assert overflows(tmp_path) == 17
    (tmp_path / "ndisc_cache").write_text("\n".join([HEAD, LINE.format(2), ""]))
    assert overflows(tmp_path) == 19


def test_this_kernel_counts_them() -> None:
    """By the first namespace of the machine, wherever the test runs."""
    try:
        assert at_machine(overflows) >= 0
    except PermissionError:
        pytest.skip("the first namespace of this machine may not be entered")


class HandClock(SystemClock):
    """Sleeps end at once; ``now`` moves on, and the watch ends with the counts."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


class Ended(Exception):
    """There are no more counts."""


def counts(*numbers: int) -> Iterator[int]:
    yield from numbers
    raise Ended


async def watched(*numbers: int, refusal: str = "") -> Conditions:
    clock = HandClock()
    conditions = Conditions(clock)
    each = counts(*numbers)
    with pytest.raises((Ended, RuntimeError)):
        await NeighborTables(
            conditions.reporter(ConditionName.NEIGHBOR_TABLE),
            clock,
            raise_limits=lambda: refusal,
            count=lambda: next(each),
        ).run()
    return conditions


async def test_an_overflow_is_a_condition_within_one_look() -> None:
    assert not (await watched(7, 7, 7)).present()
    present = (await watched(7, 8, refusal="gc_thresh3: Permission denied")).present()
    assert WATCH_SECONDS <= 15, "it is reported within 30 s, of which the description takes 10"
    assert "gc_thresh3: Permission denied" in present[ConditionName.NEIGHBOR_TABLE]


async def test_it_is_over_when_nothing_has_overflowed_for_a_while() -> None:
    calm = [8] * int(CALM_SECONDS / WATCH_SECONDS)
    assert (await watched(7, 8, *calm[:-1])).present()
    assert not (await watched(7, 8, *calm)).present()


def test_managers_read_it_off_the_nodes_description() -> None:
    labels = {condition_label(ConditionName.NEIGHBOR_TABLE): "it overflows", condition_label("disk"): "full"}
    assert network_conditions(NodeDescription(engine=EngineDescription(labels=labels))) == ("it overflows",)
    assert network_conditions(NodeDescription()) == ()
