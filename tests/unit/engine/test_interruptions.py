"""Ends from outside a container: its machine restarted, or its monitor was killed."""

from pathlib import Path
from typing import cast

import pytest
from msgspec.structs import replace

from skep.engine.capacity import Capacity, Programs
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Interruption, ProcessName
from skep.engine.runtime.bundle import Bundles
from skep.engine.runtime.runtime import EXIT_CODE_UNKNOWN, Runtime
from skep.linux.processes import boot_id
from tests.support.engine.stub_engine import a_container

GONE = 2**22
"""No process has this pid: it is the kernel's highest plus one."""
EARLIER = "8c1f6d0a-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    ("boot", "recorded", "interruption"),
    [
        ("", "7", None),
        ("", "", Interruption.MONITOR_LOST),
        (EARLIER, "143", Interruption.MACHINE_RESTARTED),
        (EARLIER, "", Interruption.MACHINE_RESTARTED),
    ],
)
async def test_only_an_end_of_its_own_boot_with_a_recorded_code_is_the_containers_own(
    tmp_path: Path, boot: str, recorded: str, interruption: Interruption | None
) -> None:
    bundles = Bundles(
        tmp_path,
        tmp_path / "run",
        cast("Cgroups", None),
        cast("Capacity", None),
        tmp_path / "resolv.conf",
    )
    runtime = Runtime(
        programs=Programs(runtimes={"runc": tmp_path}, conmon=tmp_path),
        root=tmp_path,
        bundles=bundles,
        cgroups=cast("Cgroups", None),
        capacity=cast("Capacity", None),
    )
    monitor = ProcessName(GONE, 1, boot or boot_id())
    container = replace(a_container(), monitor=monitor, process=monitor)
    if recorded:
        bundles.bundle(container.id).mkdir(parents=True)
        (bundles.bundle(container.id) / "exit").write_text(recorded)
    ended = await runtime.wait(container)
    assert ended.interruption is interruption
    assert ended.exit_code == int(recorded or EXIT_CODE_UNKNOWN)
