"""``docker update``: what of the request becomes of the container, and updates at one time."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from skep.api.http.versions import ApiVersion
from skep.engine.confinement.machine import MachineOptions
from skep.engine.containers.container import (
    Conflicting,
    Container,
    ContainerConfig,
    PlainOptions,
    RestartPolicy,
)
from skep.engine.containers.request import UpdateRequest, read_update
from skep.engine.containers.updates import updated
from skep.engine.engine import Engine
from skep.engine.lifecycle.restart import RestartContainer, StayEnded, after_end
from skep.errors import InvalidArgument, SkepError, Unimplemented
from tests.support.engine.oci_rig import Machine, memory_engine, new_container
from tests.support.engine.stub_engine import a_container
from tests.support.managers.wire_rig import until

MIB = 1 << 20
PLAIN = PlainOptions()
CLI = {
    "CpuShares": 0,
    "Memory": 0,
    "NanoCpus": 0,
    "CgroupParent": "",
    "BlkioWeight": 0,
    "BlkioWeightDevice": None,
    "BlkioDeviceReadBps": None,
    "BlkioDeviceWriteBps": None,
    "BlkioDeviceReadIOps": None,
    "BlkioDeviceWriteIOps": None,
    "CpuPeriod": 0,
    "CpuQuota": 0,
    "CpuRealtimePeriod": 0,
    "CpuRealtimeRuntime": 0,
    "CpusetCpus": "",
    "CpusetMems": "",
    "Devices": None,
    "DeviceCgroupRules": None,
    "DeviceRequests": None,
    "KernelMemory": 0,
    "KernelMemoryTCP": 0,
    "MemoryReservation": 0,
    "MemorySwap": 0,
    "MemorySwappiness": None,
    "OomKillDisable": None,
    "PidsLimit": None,
    "Ulimits": None,
    "CpuCount": 0,
    "CpuPercent": 0,
    "IOMaximumIOps": 0,
    "IOMaximumBandwidth": 0,
    "RestartPolicy": {"Name": "", "MaximumRetryCount": 0},
}
"""What the docker command sends for an option that was not given."""


def asked(**fields: Any) -> UpdateRequest:
    return read_update(json.dumps(CLI | fields).encode())


def a_plain(plain: PlainOptions | None = PLAIN, **config: Any) -> Container:
    return a_container(config=ContainerConfig(path="sh", **config), plain=plain)


def after(container: Container, **fields: Any) -> ContainerConfig:
    return updated(asked(**fields), container).config


def test_what_the_command_does_not_say_stays_as_it_is() -> None:
    container = a_plain(
        PlainOptions(restart=RestartPolicy(name="always")),
        memory_bytes=64 * MIB,
        nano_cpus=10**9,
        pids=9,
        machine=MachineOptions(cpu_shares=5, cpuset_cpus="0", memory_swap=-1),
    )
    assert updated(asked(), container) == container


def test_every_limit_of_the_command_is_one_of_the_container() -> None:
    found = after(
        a_plain(),
        CpuShares=512,
        Memory=64 * MIB,
        MemorySwap=-1,
        MemoryReservation=32 * MIB,
        CpuPeriod=50_000,
        CpuQuota=25_000,
        CpusetCpus="0",
        CpusetMems="0-1",
        BlkioWeight=300,
        PidsLimit=7,
    )
    assert found == ContainerConfig(
        path="sh",
        memory_bytes=64 * MIB,
        memory_reservation_bytes=32 * MIB,
        nano_cpus=500_000_000,
        pids=7,
        machine=MachineOptions(
            cpu_shares=512,
            memory_swap=-1,
            cpu_period=50_000,
            cpu_quota=25_000,
            cpuset_cpus="0",
            cpuset_mems="0-1",
            blkio_weight=300,
        ),
    )


def test_a_limit_of_processes_of_clients_before_version_1_40_means_nothing() -> None:
    body = json.dumps(CLI | {"PidsLimit": 0}).encode()
    assert read_update(body, ApiVersion("1.39")).pids_limit is None
    assert read_update(body, ApiVersion("1.40")).pids_limit == 0


def test_a_period_and_a_quota_may_come_one_after_the_other() -> None:
    container = a_plain(machine=MachineOptions(cpu_period=50_000))
    limited = replace(container, config=after(container, CpuQuota=25_000))
    assert limited.config.nano_cpus == 500_000_000
    assert after(limited, CpuPeriod=100_000).nano_cpus == 250_000_000
    assert after(limited, CpuQuota=-1).nano_cpus == 0


@pytest.mark.parametrize("limit", [0, -1])
def test_the_limit_of_processes_is_lifted(limit: int) -> None:
    assert after(a_plain(pids=9), PidsLimit=limit).pids == 0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"Ulimits": [{"Name": "nofile", "Soft": 1, "Hard": 2}]}, "ulimits"),
        ({"MemorySwappiness": 5}, "memoryswappiness"),
        ({"KernelMemory": 50 * MIB}, "--kernel-memory"),
        ({"CpuRealtimePeriod": 1}, "--cpu-rt-period"),
        ({"SomethingOfTomorrow": "on"}, "somethingoftomorrow"),
    ],
)
def test_what_an_update_does_not_change_is_refused_by_name(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(Unimplemented, match=f"^docker update cannot change {name}: omit it$"):
        asked(**fields)


def test_a_swappiness_of_minus_one_is_none() -> None:
    assert updated(asked(MemorySwappiness=-1), a_plain()) == a_plain()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Memory": 5 * MIB}, "Minimum memory limit allowed is 6MB"),
        ({"MemoryReservation": 5 * MIB}, "Minimum memory reservation allowed is 6MB"),
        ({"Memory": -1}, "invalid memory limit: it must not be negative"),
        ({"MemorySwap": 64 * MIB}, "You should always set the Memory limit when using Memoryswap limit"),
        ({"Memory": 64 * MIB, "MemorySwap": 32 * MIB}, "Minimum memoryswap limit should be larger than"),
        ({"NanoCpus": 1, "CpuQuota": 5000}, "Conflicting options: Nano CPUs and CPU Period cannot both be"),
        ({"CpuPeriod": 5}, "CPU cfs period can not be less than 1ms"),
        ({"CpuQuota": 5}, "CPU cfs quota can not be less than 1ms"),
        ({"CpuShares": -1}, "invalid CPU shares"),
        ({"CpusetCpus": "x"}, "Invalid value x for cpuset cpus"),
        ({"BlkioWeight": 5}, "Range of blkio weight is from 10 to 1000"),
        ({"RestartPolicy": {"Name": "often"}}, "invalid restart policy 'often'"),
    ],
)
def test_limits_are_checked_as_at_a_creation(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        updated(asked(**fields), a_plain())


@pytest.mark.parametrize(
    ("config", "fields", "what"),
    [
        ({"nano_cpus": 1}, {"CpuQuota": 5000}, "CPU Quota cannot be updated as NanoCPUs has"),
        ({"nano_cpus": 1}, {"CpuPeriod": 5000}, "CPU Period cannot be updated as NanoCPUs has"),
        (
            {"nano_cpus": 10**9, "machine": MachineOptions(cpu_quota=100_000)},
            {"NanoCpus": 1},
            "Nano CPUs cannot be updated as CPU Quota has",
        ),
        (
            {"machine": MachineOptions(cpu_period=100_000)},
            {"NanoCpus": 1},
            "Nano CPUs cannot be updated as CPU Period has",
        ),
    ],
)
def test_two_ways_to_limit_processors_exclude_each_other(
    config: dict[str, Any], fields: dict[str, Any], what: str
) -> None:
    container = a_plain(**config)
    with pytest.raises(Conflicting) as caught:
        updated(asked(**fields), container)
    assert str(caught.value) == (
        f"Cannot update container {container.id}: Conflicting options: {what} already been set"
    )


def test_the_limit_of_memory_and_swap_does_not_follow_that_of_memory() -> None:
    container = a_plain(memory_bytes=64 * MIB)
    assert after(container, Memory=100 * MIB).machine.memory_swap == 128 * MIB
    for other in (container, a_plain()):
        with pytest.raises(
            Conflicting, match="smaller than already set memoryswap limit, update the memoryswap"
        ):
            updated(asked(Memory=256 * MIB), other)
    assert after(container, Memory=512 * MIB, MemorySwap=-1).machine.memory_swap == -1


def test_a_restart_policy_holds_for_the_next_end() -> None:
    container = updated(asked(RestartPolicy={"Name": "on-failure", "MaximumRetryCount": 2}), a_plain())
    assert container.plain is not None
    assert isinstance(after_end(container.plain, 1, 1.0), RestartContainer)
    container = updated(asked(RestartPolicy={"Name": "no"}), container)
    assert container.plain is not None
    assert after_end(container.plain, 1, 1.0) == StayEnded()


def test_a_container_that_is_removed_at_its_end_gets_no_restart_policy() -> None:
    container = a_plain(PlainOptions(auto_remove=True))
    with pytest.raises(Conflicting, match="Restart policy cannot be updated because AutoRemove is enabled"):
        updated(asked(RestartPolicy={"Name": "always"}), container)
    assert updated(asked(RestartPolicy={"Name": "no"}), container) == container


def test_the_container_of_a_task_gets_no_restart_policy() -> None:
    with pytest.raises(Unimplemented, match="docker service update --restart-condition"):
        updated(asked(RestartPolicy={"Name": "always"}), a_plain(None))
    assert updated(asked(RestartPolicy={"Name": "no"}), a_plain(None)) == a_plain(None)


# --- on a container ----------------------------------------------------------------------------------------------


class Updating:
    """An engine with a running container, whose runtime's updates wait for ``gate``."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine()
        self.engine: Engine = memory_engine(directory, self.machine)
        self.gate = asyncio.Event()
        self.calls: list[ContainerConfig] = []
        self.error: SkepError | None = None
        self.machine.steps["runtime.update"] = self._update

    async def _update(self, container: Container) -> None:
        self.calls.append(container.config)
        await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def begun(self) -> Container:
        new = replace(new_container("c"), plain=PlainOptions())
        return await self.engine.start((await self.engine.add(new)).id)

    def update(self, **fields: Any) -> "asyncio.Task[Container]":
        return asyncio.create_task(self.engine.update("c", partial(updated, asked(**fields))))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Updating]:
    rig = Updating(tmp_path)
    async with rig.engine.running():
        await rig.begun()
        yield rig
        await rig.engine.remove("c", force=True)


async def test_of_two_updates_at_one_time_none_is_lost(rig: Updating) -> None:
    updates = [rig.update(PidsLimit=7), rig.update(CpuShares=512)]
    await until(lambda: rig.calls)
    rig.gate.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*updates)
    config = rig.engine.get("c").config
    assert (config.pids, config.machine.cpu_shares) == (7, 512)
    assert rig.calls[-1] == config


async def test_an_update_whose_client_goes_is_carried_out(rig: Updating) -> None:
    update = rig.update(PidsLimit=7)
    await until(lambda: rig.calls)
    update.cancel()
    await asyncio.wait([update])
    rig.gate.set()
    await until(lambda: rig.engine.get("c").config.pids == 7)


async def test_an_update_takes_no_stop_back_that_comes_meanwhile(rig: Updating) -> None:
    update = rig.update(PidsLimit=7, RestartPolicy={"Name": "always"})
    await until(lambda: rig.calls)
    rig.engine.note_stopped("c")
    rig.gate.set()
    plain = (await update).plain
    assert plain is not None
    assert (plain.is_stopped, plain.restart.name) == (True, "always")


async def test_an_update_that_the_runtime_refuses_changes_nothing(rig: Updating) -> None:
    before = rig.engine.get("c")
    rig.error = SkepError("no")
    rig.gate.set()
    with pytest.raises(SkepError, match=r"^no$"):
        await rig.update(PidsLimit=7, RestartPolicy={"Name": "always"})
    assert rig.engine.get("c") == before


async def test_a_restart_policy_alone_asks_nothing_of_the_runtime(rig: Updating) -> None:
    plain = (await rig.update(RestartPolicy={"Name": "always"})).plain
    assert plain is not None
    assert plain.restart.name == "always"
    assert not rig.calls
    assert rig.engine.events.recent(0)[-1].action == "update"


async def test_what_the_node_cannot_set_is_a_warning(rig: Updating) -> None:
    rig.machine.unapplied = ("Weight discarded.",)
    rig.gate.set()
    assert (await rig.update(BlkioWeight=300)).warnings == ("Weight discarded.",)
    assert (await rig.update(BlkioWeight=400)).warnings == ("Weight discarded.",)
