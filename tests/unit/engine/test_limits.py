"""Limits beside memory and processors, and what becomes of those that the kernel does not have."""

import time
from typing import Any

import msgspec
import pytest

from skep.engine.confinement.limits import block_io, check_cpus, resources
from skep.engine.confinement.machine import (
    MachineOptions,
    ThrottleDevice,
    WeightDevice,
    check,
    device_rule,
    numbers,
)
from skep.engine.containers.container import ContainerConfig
from skep.errors import InvalidArgument
from tests.unit.engine.test_specification import ALL_CAPACITY

V1 = msgspec.structs.replace(
    ALL_CAPACITY,
    controllers=ALL_CAPACITY.controllers | {"cpuset", "blkio"},
    has_io_weight=True,
    cpus="0-1",
    memory_nodes="0",
)
V2 = msgspec.structs.replace(
    V1, controllers=ALL_CAPACITY.controllers | {"cpuset", "io"}, is_cgroup_v2=True, has_io_weight=False
)
DISK = {"/dev/sda": (8, 0)}


def limits(capacity: Any = V1, memory_bytes: int = 0, **options: Any) -> tuple[dict[str, Any], list[str]]:
    warnings: list[str] = []
    config = ContainerConfig(path="true", memory_bytes=memory_bytes, machine=MachineOptions(**options))
    return resources(config, capacity, warnings), warnings


def test_no_more_processors_than_there_are() -> None:
    check_cpus(2_000_000_000, 2)
    check_cpus(0, 2)
    for wrong in (2_010_000_000, -1):
        with pytest.raises(
            InvalidArgument, match=r"^Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available$"
        ):
            check_cpus(wrong, 2)


def test_limits_are_passed_on_with_dockers_default_of_swap() -> None:
    assert limits(memory_bytes=10) == ({"memory": {"limit": 10, "swap": 20}}, [])
    found, warnings = limits(
        memory_bytes=10, memory_swap=-1, memory_swappiness=0, cpu_shares=2, cpuset_cpus="1"
    )
    assert found == {
        "memory": {"limit": 10, "swap": -1, "swappiness": 0},
        "cpu": {"shares": 2, "cpus": "1"},
    }
    assert warnings == []


def test_what_cgroups_v2_do_not_have_is_a_warning() -> None:
    found, warnings = limits(V2, memory_swappiness=5, oom_kill_disable=True)
    assert found == {}
    assert [one.rpartition(". ")[2] for one in warnings] == [
        "Memory swappiness discarded.",
        "OomKillDisable discarded.",
    ]


def test_limits_without_their_controller_are_warnings() -> None:
    found, warnings = limits(
        msgspec.structs.replace(V1, controllers=frozenset()), 10, cpu_shares=2, cpuset_mems="0"
    )
    assert found == {}
    assert [one.rpartition(". ")[2] for one in warnings] == [
        "Limitation discarded.",
        "Shares discarded.",
        "Cpuset discarded.",
    ]


def test_processors_that_the_machine_does_not_have_are_refused() -> None:
    with pytest.raises(
        InvalidArgument, match="Requested CPUs are not available - requested 1-2, available: 0-1"
    ):
        limits(cpuset_cpus="1-2")


def test_block_devices_are_limited_by_their_numbers() -> None:
    options = MachineOptions(
        blkio_weight=10,
        blkio_weight_device=(WeightDevice(path="/dev/sda", weight=20),),
        blkio_device_read_bps=(ThrottleDevice(path="/dev/sda", rate=7),),
    )
    warnings: list[str] = []
    disk = {"major": 8, "minor": 0}
    assert block_io(options, DISK, V1, warnings) == {
        "weight": 10,
        "weightDevice": [{**disk, "weight": 20}],
        "throttleReadBpsDevice": [{**disk, "rate": 7}],
    }
    assert warnings == []
    assert block_io(options, DISK, V2, warnings) == {"throttleReadBpsDevice": [{**disk, "rate": 7}]}
    assert [one.rpartition(". ")[2] for one in warnings] == ["Weight discarded.", "Weight-device discarded."]


@pytest.mark.parametrize(
    ("text", "found"),
    [("0", {0}), ("0-2,5", {0, 1, 2, 5}), ("", None), ("2-1", None), ("1,", None), ("-1", None), ("٣", None)],
)
def test_ranges_are_read_as_docker_reads_them(text: str, found: set[int] | None) -> None:
    assert numbers(text) == found


def test_ranges_that_repeat_themselves_cost_little() -> None:
    began = time.process_time()
    assert numbers(",".join(["0-9999"] * 20_000)) == set(range(10_000))
    assert time.process_time() - began < 5.0


def test_a_device_rule_has_numbers_or_stars() -> None:
    assert device_rule("c 10:* rw") == {"allow": True, "type": "c", "access": "rw", "major": 10}
    assert device_rule("a *:* m") == {"allow": True, "type": "a", "access": "m"}
    for text in ("x 1:2 r", "c 1 r", "c 1:2 rwmx", "c 1:2", ""):
        with pytest.raises(InvalidArgument, match="invalid device cgroup rule format"):
            device_rule(text)


def test_modes_that_docker_does_not_know_are_refused() -> None:
    for options in (
        {"ipc_mode": "x"},
        {"uts_mode": "container:a"},
        {"userns_mode": "private"},
        {"pid_mode": "container:"},
    ):
        with pytest.raises(InvalidArgument, match=r"[Ii]nvalid .* mode: "):
            check(MachineOptions(**options), 0)
    check(
        MachineOptions(
            pid_mode="container:a", ipc_mode="shareable", cgroupns_mode="host", userns_mode="host"
        ),
        0,
    )
