"""`skep upgrade` against a cluster that is made up: what becomes of a node and of the lock when it does not go well."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.api.client.client import ApiClient
from skep.cli.endpoint import HostOptions
from skep.cli.maintain import maintenance, upgrade, upgrade_means
from skep.cli.maintain.maintenance import LockHolder
from skep.cli.maintain.upgrade import _is_updated, _Upgrade
from skep.cli.maintain.upgrade_means import Means
from skep.cli.maintain.upgrade_plan import UpgradableNode
from skep.errors import FailedPrecondition, Unavailable
from skep.manager.routes import ManagerApi
from skep.model.options.labels import MAINTENANCE
from skep.model.service import Service
from skep.model.task import TaskState
from tests.support.builders import a_service, a_task
from tests.support.managers.upgraded_clusters import Installing, UpgradedCluster
from tests.support.store.store_transactions import put

OLD, NEW = "1.0.0", "1.1.0"


class MadeUp(UpgradedCluster):
    """A manager and workers without tasks."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names, version=OLD)

    @property
    def holders(self) -> tuple[LockHolder, ...]:
        return maintenance.read(self.swarm["Spec"]["Labels"].get(MAINTENANCE, ""))

    def availability(self, name: str) -> str:
        return str(self.nodes[name]["Spec"]["Availability"])


def a_run(cluster: MadeUp, **options: Any) -> _Upgrade:
    means = Installing(version=NEW, command="true", cluster=cluster, **options)
    return _Upgrade(cast("ApiClient", cluster), means, drains=True, within_s=0.05)


async def test_a_paused_node_is_paused_again() -> None:
    cluster = MadeUp("m1", "w1")
    cluster.nodes["w1"]["Spec"]["Availability"] = "pause"
    run = a_run(cluster)
    await run.take(continues=False)
    assert await run.run() == 2
    assert (cluster.availability("w1"), cluster.availability("m1")) == ("pause", "active")


async def test_a_node_that_cannot_be_reached_to_install_is_not_drained_and_the_lock_goes() -> None:
    cluster = MadeUp("m1", "w1")
    run = a_run(cluster, refuses=frozenset({"w1"}))
    await run.take(continues=False)
    with pytest.raises(Unavailable, match=r"w1 cannot be upgraded and is unchanged: Host key"):
        await run.run()
    assert (cluster.availability("w1"), cluster.holders) == ("active", ())


async def test_an_interrupted_one_is_not_continued_past_a_node_that_does_not_come_back() -> None:
    """w1 went down with the new version, or before it showed that."""
    for version in (NEW, OLD):
        cluster = MadeUp("m1", "w1", "w2")
        first = a_run(cluster, breaks=frozenset({"w1"}))
        await first.take(continues=False)
        with pytest.raises(Unavailable, match=r"It stays drained\. Repair the node"):
            await first.run()
        cluster.show("w1", version, "down")
        second = a_run(cluster, breaks=frozenset({"w1"}))
        await second.take(continues=True)
        with pytest.raises(Unavailable, match=r"w1.*Repair"):
            await second.run()
        assert cluster.nodes["w2"]["Description"]["Engine"]["EngineVersion"] == OLD
        assert cluster.availability("w1") == "drain"
        assert [one.node for one in cluster.holders] == ["w1"]
        cluster.show("w1", version)
        third = a_run(cluster)
        await third.take(continues=True)
        await third.run()
        assert {cluster.availability(name) for name in ("m1", "w1", "w2")} == {"active"}


@pytest.mark.parametrize(("level", "is_back"), [(1, True), (2, False)])
async def test_a_manager_gets_no_version_back_that_cannot_read_the_data(level: int, *, is_back: bool) -> None:
    """The last manager reported the new level before its node failed."""
    cluster = MadeUp("m1")
    run = a_run(cluster, breaks=frozenset({"m1"}), rollback="true", level=level)
    await run.take(continues=False)
    words = (
        "It has 1.0.0 again" if is_back else "the cluster's data has level 2 and 1.0.0 reads level 1 at most"
    )
    with pytest.raises(Unavailable, match=words):
        await run.run()
    version = cluster.nodes["m1"]["Description"]["Engine"]["EngineVersion"]
    assert version == (OLD if is_back else NEW)


@pytest.mark.parametrize(
    ("hostname", "shown"),
    [
        ("w1.example", "w1.example"),
        ("-oProxyCommand=touch /tmp/x", "id1"),
        ("w1 -oProxyCommand=x", "id1"),
        ("", "id1"),
    ],
)
async def test_a_command_gets_no_host_name_that_is_an_option(
    tmp_path: Path, hostname: str, shown: str
) -> None:
    """A worker chooses its host name, and the operator's command runs on the operator's machine."""
    means = Means(version=NEW, command=f'printf %s "$SKEP_NODE" >{tmp_path}/name')
    await means.upgrade(UpgradableNode(id="id1", name=hostname))
    assert (tmp_path / "name").read_text() == shown


async def test_tasks_are_not_spread_again_before_the_leader_has_begun_that_update(
    cluster: tuple[ManagerApi, Any],
) -> None:
    manager, host = cluster
    service = a_service("web")
    template = replace(service.spec.task_template, force_update=1)
    forced = replace(service, spec=replace(service.spec, task_template=template))
    for one in (service, a_task("t1", service=service), forced):
        await manager.store.update(put, one)
    async with host.client() as client:
        assert not await _is_updated(client, "web")
        retired = replace(a_task("t1", service=service), desired_state=TaskState.SHUTDOWN)
        for one in (retired, a_task("t2", service=manager.store.view().get(Service, "web"))):
            await manager.store.update(put, one)
        assert await _is_updated(client, "web")


OTHER = LockHolder(
    node="w1",
    by="other",
    until=datetime(2026, 1, 31, 13, tzinfo=UTC),
    is_upgrade=True,
    availability="active",
)


class TakenOver(Installing, frozen=True, kw_only=True):
    """Another upgrade takes over while a node is being upgraded."""

    async def upgrade(self, node: UpgradableNode) -> None:
        await super().upgrade(node)
        self.cluster.swarm["Spec"] = {"Labels": {MAINTENANCE: maintenance.written([OTHER])}}


async def test_a_node_is_not_rolled_back_after_another_one_has_taken_over() -> None:
    cluster = MadeUp("m1", "w1")
    means = TakenOver(version=NEW, command="true", rollback="true", cluster=cluster, breaks=frozenset({"w1"}))
    run = _Upgrade(cast("ApiClient", cluster), means, drains=True, within_s=0.05)
    await run.take(continues=False)
    with pytest.raises(FailedPrecondition, match="an upgrade is held by other for w1"):
        await run.run()
    assert cluster.nodes["w1"]["Description"]["Engine"]["EngineVersion"] == NEW


async def test_what_another_one_has_taken_over_is_left_to_it() -> None:
    cluster = MadeUp("m1", "w1")
    run = a_run(cluster)
    await run.take(continues=False)
    run.holder = replace(run.holder, node="w1", availability="active")
    other = OTHER
    cluster.swarm["Spec"] = {"Labels": {MAINTENANCE: maintenance.written([other])}}
    cluster.nodes["w1"]["Spec"]["Availability"] = "drain"
    await run.end()
    assert (cluster.availability("w1"), cluster.holders) == ("drain", (other,))


class Aborted(Installing, frozen=True, kw_only=True):
    """A user aborts the upgrade while it runs: before or after its first node is installed."""

    is_early: bool = False

    async def check(self, node: UpgradableNode) -> bool:
        if self.is_early:
            await upgrade.abort(cast("HostOptions", self.cluster))
        return await super().check(node)

    async def upgrade(self, node: UpgradableNode) -> None:
        await super().upgrade(node)
        await upgrade.abort(cast("HostOptions", self.cluster))


@pytest.mark.parametrize("is_early", [False, True])
async def test_an_upgrade_that_was_aborted_takes_no_other_node(*, is_early: bool) -> None:
    cluster = MadeUp("m1", "w1", "w2")
    means = Aborted(version=NEW, command="true", cluster=cluster, is_early=is_early)
    with pytest.raises(FailedPrecondition, match=r"^The upgrade was aborted meanwhile\."):
        await upgrade.carry_out(
            cast("HostOptions", cluster), means, drains=True, within_s=0.05, continues=False
        )
    versions = [one["Description"]["Engine"]["EngineVersion"] for one in cluster.nodes.values()]
    assert versions == [OLD, OLD if is_early else NEW, OLD]
    assert (cluster.holders, {cluster.availability(name) for name in cluster.nodes}) == ((), {"active"})


class MovesOn(MadeUp):
    """The upgrade drains its next node while its abort activates the first one."""

    async def request(self, method: str, path: str, **options: Any) -> Any:
        found = await super().request(method, path, **options)
        if path == "/nodes/w1/update":
            text = maintenance.written([replace(self.holders[0], node="w2")])
            self.swarm["Spec"] = {"Labels": {MAINTENANCE: text}}
            self.nodes["w2"]["Spec"]["Availability"] = "drain"
        return found


async def test_an_abort_activates_the_node_that_the_upgrade_has_drained_meanwhile() -> None:
    cluster = MovesOn("m1", "w1", "w2")
    run = a_run(cluster)
    await run.take(continues=False)
    await run.hold(node="w1", availability="active")
    cluster.nodes["w1"]["Spec"]["Availability"] = "drain"
    await upgrade.abort(cast("HostOptions", cluster))
    assert (cluster.holders, {cluster.availability(name) for name in cluster.nodes}) == ((), {"active"})


async def held_by_an_upgrade_of_a_removed_node() -> tuple[MadeUp, _Upgrade]:
    cluster = MadeUp("m1", "w1")
    run = a_run(cluster)
    await run.take(continues=False)
    await run.hold(node="w1", availability="active")
    assert [one.node for one in cluster.holders] == ["w1"]
    del cluster.nodes["w1"]
    return cluster, run


async def test_an_upgrade_of_a_removed_node_can_be_aborted() -> None:
    cluster, _ = await held_by_an_upgrade_of_a_removed_node()
    await upgrade.abort(cast("HostOptions", cluster))
    assert cluster.holders == ()


async def test_the_lock_goes_with_an_upgrade_whose_node_was_removed() -> None:
    cluster, run = await held_by_an_upgrade_of_a_removed_node()
    await run.end()
    assert cluster.holders == ()


@pytest.mark.parametrize(
    ("installed", "is_kept"),
    [("installed 1.0.0", True), ("installed 1.1.0", False), ("half-configured 1.1.0", False)],
)
def test_the_way_back_is_packed_from_the_former_version_alone(
    tmp_path: Path, installed: str, is_kept: bool
) -> None:
    """A second attempt finds what an interrupted one has installed; the way back does not lead there."""
    former, info = tmp_path / "cache/former.deb", tmp_path / "info"
    info.mkdir()
    for name in ("postinst", "prerm", "postrm"):
        (info / f"skep.{name}").touch()
    programs = {
        "dpkg-query": f'case $1 in -W) printf %s "{installed}" ;; -s) echo "Package: skep" ;; esac',
        "dpkg-deb": 'case $1 in -f) echo 1.1.0 ;; *) for last; do :; done; echo former >"$last" ;; esac',
        "apt-get": f'echo "$@" >{tmp_path}/apt; exit 100',
    }
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in programs.items():
        (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
        (binaries / name).chmod(0o755)
    script = upgrade_means.REPLACE.replace(upgrade_means.FORMER, str(former)).replace(
        "/var/lib/dpkg/info", str(info)
    )
    done = subprocess.run(
        ["sh", "-c", f"umask 077\n{script}"],
        input=b"new",
        env={"PATH": f"{binaries}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)},
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1, "as apt-get fails"
    assert former.exists() == is_kept
    assert "DPkg::Lock::Timeout" in (tmp_path / "apt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("tmp.")) == []
