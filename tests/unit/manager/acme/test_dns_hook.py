"""The administrator's program for DNS records: how it is run, and what its failures say."""

import os
from pathlib import Path

import pytest

from skep.manager.acme.calls import AuthorityCalls
from skep.manager.acme.dns_hook import DnsHook
from skep.manager.acme.records import AcmeAccount, CertificateOrder, HostCertificate
from skep.manager.acme.steps import AcmeFailed, after_step
from skep.model.values.times import SECOND_NS

pytestmark = pytest.mark.needs("root")  # others' programs are not run

RECORD = {"_acme-challenge.example.com": "$(touch never); value"}


def a_program(directory: Path, text: str) -> str:
    program = directory / "hook"
    program.write_text(f"#!/bin/sh\ncd {directory}\n{text}\n")
    program.chmod(0o755)
    return str(program)


async def test_values_reach_the_program_as_they_are_and_once(tmp_path: Path) -> None:
    hook = DnsHook(a_program(tmp_path, 'printf "%s|" "$@" "$(env | grep -c TOKEN)" >>runs'))
    assert await hook.set(RECORD, "key") == await hook.set(RECORD, "key") == ""
    await hook.remove(RECORD)
    await hook.set(RECORD, "key")
    [(name, value)] = RECORD.items()
    run = f"{name}|{value}|0|"
    assert (tmp_path / "runs").read_text() == f"set|{run}remove|{run}set|{run}"


async def test_records_of_another_order_are_written_although_they_are_the_same(tmp_path: Path) -> None:
    hook = DnsHook(a_program(tmp_path, 'echo "$1" >>runs'))
    for order in ("key 1", "key 1", "key 2"):  # another leader has removed those of the first order
        assert await hook.set(RECORD, order) == ""
    assert (tmp_path / "runs").read_text().split() == ["set", "set"]


async def test_a_failure_is_shown_with_the_end_of_the_program(tmp_path: Path) -> None:
    hook = DnsHook(a_program(tmp_path, "echo no such zone >&2; exit 3"))
    assert (await hook.set(RECORD, "key")).endswith("set failed with exit code 3: no such zone")
    assert (
        await DnsHook("/nonexistent").set(RECORD, "key")
    ) == "/nonexistent cannot be run: no such file or directory"


async def test_a_program_that_others_can_change_is_refused_by_name(tmp_path: Path) -> None:
    hook, program = DnsHook(a_program(tmp_path, "touch ran")), tmp_path / "hook"
    for path, mode in ((program, 0o775), (program, 0o757), (tmp_path, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert f"others than root may change {path}: let it belong to root" in await hook.set(RECORD, "key")
        path.chmod(before)
    (tmp_path / "link").symlink_to(program)
    assert "may change" in await DnsHook(str(tmp_path / "link")).set(RECORD, "key")
    os.chown(program, 1000, 1000)
    assert f"may change {program}" in await hook.set(RECORD, "key")
    assert not (tmp_path / "ran").exists()
    os.chown(program, 0, 0)
    assert await hook.set(RECORD, "key") == ""


async def test_a_program_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    hook = DnsHook(a_program(tmp_path, "sleep 600 & echo $! >child; wait"), deadline_s=0.3)
    assert "did not end within 0.3 s" in await hook.set(RECORD, "key")
    words = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/cmdline")
    assert not words.exists() or words.read_bytes() == b""  # of a process that nobody waits for


async def test_a_manager_without_the_program_keeps_the_order_for_the_next_leader() -> None:
    order = CertificateOrder(key="k", began_ns=1, url="https://ca/order", dns=RECORD)
    record = HostCertificate(name="*.example.com", order=order)
    account = AcmeAccount(email="ops@example.com", directory="https://ca/dir", key="k")
    outcome = await AuthorityCalls().run_step(account, record)
    assert isinstance(outcome, AcmeFailed)
    assert "acme-dns-hook is not set on this manager" in outcome.reason
    after = after_step(record, outcome, now_ns=SECOND_NS, chance=0.0)
    assert (after.order, after.retry_at_ns) == (order, 181 * SECOND_NS)


async def test_records_that_orders_left_are_removed_and_nothing_else_is_asked(tmp_path: Path) -> None:
    hook = DnsHook(a_program(tmp_path, 'echo "$1 $2" >>runs'))
    record = HostCertificate(name="*.example.com", left=RECORD)
    account = AcmeAccount(email="ops@example.com", directory="https://ca/dir", key="k")
    outcome = await AuthorityCalls(hook).run_step(account, record)
    assert (tmp_path / "runs").read_text() == "remove _acme-challenge.example.com\n"
    assert after_step(record, outcome, now_ns=SECOND_NS, chance=0.0).left == {}
