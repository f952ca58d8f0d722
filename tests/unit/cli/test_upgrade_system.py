"""`skep upgrade --system`: nodes that need a reboot, one at a time under drain, and what becomes of a failed one."""

import asyncio
import os
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from skep.api.client.client import ApiClient
from skep.cli.endpoint import HostOptions
from skep.cli.main import main
from skep.cli.maintain import maintenance
from skep.cli.maintain.maintenance import LockHolder
from skep.cli.maintain.upgrade import _Upgrade, carry_out, show_plan
from skep.cli.maintain.upgrade_means import Means, UpgradeAction
from skep.cli.maintain.upgrade_plan import UpgradableNode
from skep.cli.maintain.upgrade_system import INSTALL, LOOK, REBOOT, SystemMeans
from skep.errors import FailedPrecondition, Unavailable
from skep.linux.processes import boot_id
from skep.model.node_reports.conditions import BOOT_LABEL, ConditionName, condition_label
from skep.model.options.labels import MAINTENANCE
from tests.support.managers.upgraded_clusters import UpgradedCluster

REQUIRED = condition_label(ConditionName.REBOOT_REQUIRED)
FROZEN = {"Freezes": {"": {"Until": "2026-02-01T00:00:00Z", "By": "root"}}}


class Machines(UpgradedCluster):
    """Nodes with boot ids.  ``due``: the nodes that need a reboot."""

    def __init__(self, *names: str, due: tuple[str, ...]) -> None:
        super().__init__(*names, version="1.0.0")
        self.rebooted: list[str] = []
        self.log: list[str] = []
        for name in names:
            self.labels(name)[BOOT_LABEL] = f"{name}-0"
        for name in due:
            self.labels(name)[REQUIRED] = "the machine needs a reboot for linux"

    def labels(self, name: str) -> dict[str, str]:
        return cast("dict[str, str]", self.nodes[name]["Description"]["Engine"]["Labels"])

    def boot(self, name: str) -> None:
        self.rebooted.append(name)
        self.labels(name)[BOOT_LABEL] = f"{name}-{len(self.rebooted)}"
        self.labels(name).pop(REQUIRED, None)
        self.nodes[name]["Status"]["State"] = "ready"

    def availability(self, name: str) -> str:
        return str(self.nodes[name]["Spec"]["Availability"])

    @property
    def holders(self) -> tuple[LockHolder, ...]:
        return maintenance.read(self.swarm["Spec"]["Labels"].get(MAINTENANCE, ""))

    def hand_over(self) -> None:
        """Let another run take the lock."""
        other = LockHolder(node="", by="other", until=datetime(2027, 1, 1, tzinfo=UTC), is_upgrade=True)
        self.swarm["Spec"] = {"Labels": {MAINTENANCE: maintenance.written([other])}}


class Rebooting(SystemMeans, frozen=True, kw_only=True):
    """Reboots at once.  ``breaks``: nodes that stay down.  ``idle``: nodes that ignore the request."""

    cluster: Machines
    breaks: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()

    async def check(self, node: UpgradableNode) -> bool:
        self.cluster.log.append(f"check {node.name}")
        if self.cluster.nodes[node.name]["Status"]["State"] != "ready":
            raise Unavailable("connection refused")
        return bool(node.reboot or node.id in self.pending)

    async def upgrade(self, node: UpgradableNode) -> None:
        cluster = self.cluster
        others = [name for name in cluster.nodes if name != node.name]
        assert cluster.availability(node.name) == "drain"
        assert {cluster.availability(name) for name in others} <= {"active"}
        assert [(one.node, one.boot) for one in cluster.holders] == [(node.id, node.boot)]
        if node.name in self.breaks:
            cluster.nodes[node.name]["Status"]["State"] = "down"
        elif node.name not in self.idle:
            cluster.boot(node.name)

    async def _install(self, node: UpgradableNode) -> None:
        self.cluster.log.append(f"install {node.name}")
        self.pending.pop(node.id)


async def a_run(cluster: Machines, means: Means | None = None, *, continues: bool = False) -> int:
    run = _Upgrade(
        cast("ApiClient", cluster), means or Rebooting(cluster=cluster), drains=True, within_s=0.05
    )
    await run.take(continues=continues)
    return await run.run()


async def test_only_nodes_that_need_it_are_rebooted_workers_first_and_the_leader_last() -> None:
    cluster = Machines("m1", "m2", "m3", "w1", "w2", due=("m1", "m3", "w2"))
    assert await a_run(cluster) == 3
    assert cluster.rebooted == ["w2", "m3", "m1"]
    assert {cluster.availability(name) for name in cluster.nodes} == {"active"}


async def test_a_node_that_stays_down_stops_the_rest_and_the_way_on_is_named() -> None:
    cluster = Machines("m1", "w1", "w2", due=("m1", "w1", "w2"))
    with pytest.raises(Unavailable) as raised:
        await a_run(cluster, Rebooting(cluster=cluster, breaks=frozenset({"w1"})))
    assert str(raised.value) == (
        "w1 did not return healthy from its reboot: after 0.05 s it is not ready with 1.0.0. It stays drained. Repair "
        "the node and run skep upgrade --system --continue, or use --abort."
    )
    assert (cluster.rebooted, cluster.availability("w1")) == ([], "drain")
    assert [one.node for one in cluster.holders] == ["w1"]
    with pytest.raises(Unavailable, match="the interrupted upgrade of w1 did not succeed"):
        await a_run(cluster, continues=True)
    assert cluster.rebooted == []
    cluster.boot("w1")
    assert await a_run(cluster, continues=True) == 2
    assert cluster.rebooted == ["w1", "w2", "m1"], "w1 has rebooted already"
    assert {cluster.availability(name) for name in cluster.nodes} == {"active"}


async def test_a_node_that_is_ready_with_the_same_boot_id_has_not_rebooted() -> None:
    cluster = Machines("m1", "w1", due=("w1",))
    with pytest.raises(Unavailable, match="it is ready but not rebooted, with"):
        await a_run(cluster, Rebooting(cluster=cluster, idle=frozenset({"w1"})))
    assert cluster.availability("w1") == "drain"
    assert await a_run(cluster, continues=True) == 1
    assert (cluster.rebooted, cluster.availability("w1")) == (["w1"], "active")


class Interrupted(Rebooting, frozen=True, kw_only=True):
    async def upgrade(self, node: UpgradableNode) -> None:
        raise asyncio.CancelledError


async def test_a_run_that_ended_before_the_reboot_is_continued_with_its_node() -> None:
    cluster = Machines("m1", "w1", "w2", due=("w1", "w2"))
    with pytest.raises(asyncio.CancelledError):
        await a_run(cluster, Interrupted(cluster=cluster))
    with pytest.raises(FailedPrecondition, match=r"a system upgrade is held by .* for w1 .* Use --continue"):
        await a_run(cluster)
    assert await a_run(cluster, continues=True) == 2
    assert cluster.rebooted == ["w1", "w2"]


async def test_a_run_that_ended_after_the_installation_reboots_its_node_without_another_package() -> None:
    """Libraries leave no mark that the machine needs a reboot."""
    cluster = Machines("m1", "w1", "w2", due=())
    with pytest.raises(asyncio.CancelledError):
        await a_run(cluster, Interrupted(cluster=cluster, installs=True, pending={"w1": ("apt", 2)}))
    found = Rebooting(cluster=cluster, installs=True, pending={})
    assert await a_run(cluster, found, continues=True) == 1
    assert cluster.rebooted == ["w1"]


async def test_a_manager_that_is_down_and_two_managers_forbid_the_reboot_of_another_one() -> None:
    cluster = Machines("m1", "m2", "m3", due=("m3",))
    cluster.nodes["m2"]["ManagerStatus"]["Reachability"] = "unreachable"
    with pytest.raises(FailedPrecondition, match="the manager m2 is unreachable"):
        await a_run(cluster)
    two = Machines("m1", "m2", due=("m2",))
    with pytest.raises(FailedPrecondition, match="two managers need each other"):
        await a_run(two)
    assert cluster.rebooted == two.rebooted == []


class HandedOver(Rebooting, frozen=True, kw_only=True):
    """Another run takes over while packages are installed."""

    async def _install(self, node: UpgradableNode) -> None:
        self.cluster.hand_over()


async def test_a_suspended_run_does_not_reboot_after_another_one_has_taken_over() -> None:
    cluster = Machines("m1", "w1", due=("w1",))
    means = HandedOver(cluster=cluster, installs=True, pending={"w1": ("apt", 2)})
    with pytest.raises(FailedPrecondition, match="held by other"):
        await a_run(cluster, means)
    assert cluster.rebooted == []


async def test_with_packages_a_node_without_any_is_not_drained(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Machines("m1", "w1", "w2", due=("m1",))
    means = Rebooting(cluster=cluster, installs=True, pending={"w2": ("apt", 2)})
    assert await a_run(cluster, means) == 2
    assert cluster.rebooted == ["w2", "m1"]
    assert cluster.log == ["check w1", "check w2", "install w2", "check m1"]
    assert "w2: installing 2 packages with apt-get upgrade --with-new-pkgs" in capsys.readouterr().err


async def test_a_freeze_that_begins_stops_the_run_between_two_nodes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Freezing(Rebooting, frozen=True, kw_only=True):
        async def upgrade(self, node: UpgradableNode) -> None:
            await super().upgrade(node)
            cluster.freezes = FROZEN

    for is_override, rebooted in ((False, ["w1"]), (True, ["w1", "w2"])):
        cluster = Machines("m1", "w1", "w2", due=("w1", "w2"))
        run = carry_out(
            cast("HostOptions", cluster),
            Freezing(cluster=cluster),
            drains=True,
            within_s=0.05,
            continues=False,
            is_override=is_override,
        )
        if is_override:
            await run
        else:
            with pytest.raises(FailedPrecondition, match="frozen"):
                await run
        assert (cluster.rebooted, cluster.holders, cluster.availability("w1")) == (rebooted, (), "active")
    assert capsys.readouterr().out == "2 nodes rebooted\n"


async def test_each_kind_of_upgrade_leaves_the_interrupted_one_of_the_other_kind_alone() -> None:
    cluster = Machines("m1", "w1", due=("w1",))
    with pytest.raises(asyncio.CancelledError):
        await a_run(cluster, Interrupted(cluster=cluster))
    with pytest.raises(
        FailedPrecondition, match=r"Run skep upgrade --system --continue, or skep upgrade --abort"
    ):
        await a_run(cluster, Means(version="2", command="true"), continues=True)
    cluster.hand_over()
    with pytest.raises(FailedPrecondition, match=r"Run skep upgrade without --system --continue"):
        await a_run(cluster, continues=True)


async def test_the_steps_are_shown_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Machines("m1", "w1", "w2", due=("m1", "w1"))
    assert (
        await show_plan(cast("HostOptions", cluster), SystemMeans(ssh_user="root", command=""), drains=True)
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "1. w1 (worker): drain, reboot, activate: the machine needs a reboot for linux",
        "2. m1 (leader): drain, reboot, activate: the machine needs a reboot for linux",
        "up to date: w2",
    ]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--packages", "--command", "x", "--to", "2"), "--packages needs --system"),
        (("--system", "--keep-running"), "--system cannot be combined"),
        (("--system", "--to", "2"), "--system cannot be combined"),
        (("--system", "--packages", "--command", "x"), "--packages needs SSH"),
        (("--abort", "--dry-run"), "--abort cannot be combined"),
        (("--abort", "--continue"), "--abort cannot be combined"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: tuple[str, ...], error: str) -> None:
    result = CliRunner().invoke(main, ["upgrade", *words])
    assert result.exit_code == 1
    assert error in result.stderr


async def test_the_machine_of_the_command_and_a_node_without_a_boot_id_are_refused_by_name() -> None:
    means = SystemMeans(here="b1")
    with pytest.raises(Unavailable, match="this command runs on it"):
        await means.check(UpgradableNode(id="w1", name="w1", boot="b1"))
    with pytest.raises(Unavailable, match="does not report its boot id"):
        await means.check(UpgradableNode(id="w1", name="w1"))


APT = """case " $* " in
*" --simulate "*) printf 'Inst libc6 [1] (2)\\nInst linux (3)\\nConf libc6 (2)\\n' ;;
*" update "*) ;;
*) for one; do case $one in Dir::Etc::Preferences=*) cat "${one#*=}" >>"$CALLS" ;; esac; done
echo "E: broken" >&2; exit 100 ;;
esac
echo "$@" >>"$CALLS"
"""
DNF = """case " $* " in
*" check-update "*) printf '\\nkernel.x86_64  6.1  updates\\nObsoleting Packages\\na.x86_64 1 b\\n'; exit 100 ;;
esac
echo "$@" >>"$CALLS"
"""


def scripted(folder: Path, script: str, programs: Mapping[str, str], boot: str) -> Any:
    """Run a script of the system upgrade with the ``programs`` alone, besides those of the shell."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    for name in ("id", "cat", "mktemp", "rm", "tail", "grep", "awk", "sh", "setsid", "true"):
        (binaries / name).symlink_to(f"/usr/bin/{name}")
    for name, text in programs.items():
        (binaries / name).write_text(f"#!/bin/bash\n{text}\n")
        (binaries / name).chmod(0o755)
    environment = {"PATH": str(binaries), "TMPDIR": str(folder), "CALLS": str(folder / "calls")}
    return subprocess.run(
        ["/bin/sh", "-c", f"boot={boot}\n{script}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize(
    ("programs", "found"), [({"apt-get": APT}, "apt 2\n"), ({"dnf": DNF}, "dnf 1\n"), ({}, "")]
)
def test_pending_packages_are_counted(tmp_path: Path, programs: Mapping[str, str], found: str) -> None:
    done = scripted(tmp_path, LOOK, programs, boot_id())
    assert (done.stdout, done.returncode) == (found, 0 if found else 1)
    assert found or "neither apt nor dnf is on this machine" in done.stderr


def test_a_failed_installation_shows_the_last_lines(tmp_path: Path) -> None:
    done = scripted(tmp_path / "apt", INSTALL, {"apt-get": APT}, boot_id())
    assert (done.returncode, done.stderr) == (1, "E: broken\n")
    kept = "Package: skep\nPin: version *\nPin-Priority: -1\n"
    assert kept in (tmp_path / "apt/calls").read_text(), "skep upgrade --package upgrades it"
    done = scripted(tmp_path / "dnf", INSTALL, {"dnf": DNF}, boot_id())
    assert (done.returncode, (tmp_path / "dnf/calls").read_text()) == (0, "-y --exclude=skep upgrade\n")


@pytest.mark.parametrize("script", [LOOK, INSTALL, REBOOT])
def test_a_machine_with_another_boot_id_is_left_alone(tmp_path: Path, script: str) -> None:
    touch = f": >{tmp_path}/touched"
    programs = dict.fromkeys(("apt-get", "dnf", "systemctl", "reboot", "sleep"), touch)
    done = scripted(tmp_path, script, programs, "another")
    assert done.returncode == 1
    assert "this machine has another boot id than the node" in done.stderr
    assert not (tmp_path / "touched").exists()


def test_the_reboot_begins_after_the_script_has_ended(tmp_path: Path) -> None:
    go, order = tmp_path / "go", tmp_path / "order"
    os.mkfifo(go)
    programs = {"sleep": f"cat {go}", "systemctl": f'echo "$@" >{order}'}
    assert scripted(tmp_path, REBOOT, programs, boot_id()).returncode == 0
    assert not order.exists()
    os.mkfifo(order)
    go.write_text("")
    assert order.read_text() == "reboot\n"


def test_the_installed_actions_of_a_node() -> None:
    means = SystemMeans(installs=True, pending={"w1": ("dnf", 1)})
    node = UpgradableNode(id="w1", name="w1", boot="b1")
    assert [one.words for one in means.actions(node) if isinstance(one, UpgradeAction)] == [
        "installing 1 package with dnf upgrade",
        "rebooting",
    ]


async def test_the_scripts_reach_the_machine_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSH joins its words by spaces for the shell of the machine."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    ssh = 'echo "$@" >>"$CALLS"; while [ "$1" != -- ]; do shift; done; shift 2; exec sh -c "$*"'
    for name, text in {
        "ssh": ssh,
        "apt-get": APT,
        "systemctl": 'echo "$@" >"$REBOOTED"',
        "sleep": "",
    }.items():
        (binaries / name).write_text(f"#!/bin/bash\n{text}\n")
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("REBOOTED", str(tmp_path / "rebooted"))
    os.mkfifo(tmp_path / "rebooted")
    means = SystemMeans(installs=True, ssh_user="admin")
    node = UpgradableNode(id="w1", name="w1", address="192.0.2.7", boot=boot_id())
    assert await means.check(node)
    assert means.pending == {"w1": ("apt", 2)}
    assert "-l admin -- 192.0.2.7 sh -c" in (tmp_path / "calls").read_text()
    install, reboot = means.actions(node)
    with pytest.raises(Unavailable, match="E: broken"):
        await install.run()
    await reboot.run()
    assert await asyncio.to_thread((tmp_path / "rebooted").read_text) == "reboot\n"
    with pytest.raises(Unavailable, match="this machine has another boot id than the node"):
        await means.check(UpgradableNode(id="w2", name="w2", address="192.0.2.7", boot="b2"))
