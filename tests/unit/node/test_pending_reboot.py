"""When a node says that its machine needs a reboot, and what it says."""

import asyncio
from pathlib import Path

from skep.aio.clock import SystemClock
from skep.model.node_reports.conditions import CHARACTERS_MAX
from skep.model.values.times import SECOND_NS
from skep.node.host.conditions import Conditions
from skep.node.host.pending_reboot import keep_condition, look, pending_reboot
from tests.support.engine.oci_rig import QuickClock

RUNNING = "6.1.0-1-amd64"


def reason(root: Path, *, booted_s_ago: float, clock_s_ahead: float = 60) -> str:
    """The condition's text on a machine that was booted some seconds before the files were written."""
    now_ns = SystemClock().now_ns()
    booted_ns, now_ns = now_ns - round(booted_s_ago * SECOND_NS), now_ns + round(clock_s_ahead * SECOND_NS)
    found = pending_reboot(root, RUNNING, booted_ns, now_ns)
    return found.text if found is not None else ""


def written(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_debians_mark_has_the_packages_each_once_and_a_few_by_name(tmp_path: Path) -> None:
    assert reason(tmp_path, booted_s_ago=60) == ""
    written(tmp_path / "run/reboot-required", "*** System restart required ***\n")
    assert reason(tmp_path, booted_s_ago=60) == (
        "the machine needs a reboot (/run/reboot-required): run skep upgrade --system"
    )
    names = ["linux-image-6.1.0-2-amd64", "libc6", "libc6", "dbus", "$(touch /x)", "systemd", "openssl", ""]
    written(tmp_path / "run/reboot-required.pkgs", "\n".join(names))
    assert reason(tmp_path, booted_s_ago=60) == (
        "the machine needs a reboot for dbus, libc6, linux-image-6.1.0-2-amd64 and 2 more "
        "(/run/reboot-required): run skep upgrade --system"
    )


def test_the_text_is_bounded_whatever_the_file_has(tmp_path: Path) -> None:
    written(tmp_path / "run/reboot-required")
    written(tmp_path / "run/reboot-required.pkgs", "\n".join(f"{n:04}{'x' * 60}" for n in range(10_000)))
    found = pending_reboot(tmp_path, RUNNING, 0, 0)
    assert found is not None
    assert len(found.names) < 1100
    assert 200 < len(found.text) <= CHARACTERS_MAX
    written(tmp_path / "run/reboot-required.pkgs", "x" * 100_000)
    assert " for " not in reason(tmp_path, booted_s_ago=60)


def test_suses_mark_is_one_without_packages(tmp_path: Path) -> None:
    written(tmp_path / "run/reboot-needed")
    assert "(/run/reboot-needed)" in reason(tmp_path, booted_s_ago=60)


def test_a_kernel_that_was_installed_since_the_boot_does_not_run_yet(tmp_path: Path) -> None:
    modules = tmp_path / "lib/modules"
    written(modules / "6.1.0-2-amd64/modules.dep")
    written(tmp_path / "boot/vmlinuz-6.1.0-2-amd64")
    written(modules / "6.2.fc/vmlinuz")
    assert reason(tmp_path, booted_s_ago=60) == "", "a container has no files of its kernel"
    (modules / RUNNING).mkdir()
    assert reason(tmp_path, booted_s_ago=60) == (
        "the machine needs a reboot for kernel 6.1.0-2-amd64, kernel 6.2.fc (/lib/modules): run skep upgrade --system"
    )
    assert reason(tmp_path, booted_s_ago=-30) == "", "it was there before the boot"
    assert reason(tmp_path, booted_s_ago=60, clock_s_ahead=-3600) == "", "the clock is not set yet"


async def test_the_condition_comes_and_goes_and_each_change_is_announced() -> None:
    conditions, reasons, changes = Conditions(SystemClock()), [""], list[str]()
    looking = asyncio.create_task(
        keep_condition(
            conditions,
            QuickClock(),
            lambda: changes.append(" ".join(conditions.present().values())),
            lambda: reasons[-1],
        )
    )
    for text in ("needs one", "needs one for linux", ""):
        reasons.append(text)
        async with asyncio.timeout(30):
            while text not in changes:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    looking.cancel()
    assert changes == ["needs one", "needs one for linux", ""]


def test_this_machine_is_looked_at() -> None:
    assert isinstance(look(SystemClock()), str)
