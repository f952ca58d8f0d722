"""Three managers whose store reaches its quota, by users and by another client: it recovers by itself."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError, DockerException
from requests.exceptions import RequestException

from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.errors import OutOfSpace
from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    containers,
    create,
    running,
    wait_running,
    wait_until,
)
from tests.support.managers.managers_rig import wait_managers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MANAGERS = ("m1", "m2", "m3")
QUOTA_MIB = 16
CONFIG_BYTES = 600_000
MADE_WITHIN_S = 90
"""The leader looks each 5 s, cuts history each 30 s, and a hand-over is two looks more."""


def put_config(node: TestNode, name: str) -> str:
    """Why this was refused; empty: it was taken."""
    try:
        node.client().api.create_config(name, os.urandom(CONFIG_BYTES))
    except APIError as error:
        return str(error)
    return ""


def until_refused(node: TestNode) -> tuple[list[str], str]:
    """Configs that were taken, and why the next one was not."""
    taken: list[str] = []
    for number in count():
        if why := put_config(node, name := f"c{number}"):
            return taken, why
        taken.append(name)
        assert len(taken) < 100, "nothing was ever refused"
    raise AssertionError("endless")


def status(node: TestNode) -> str:
    """The line of ``skep status`` about the store."""
    command = [SKEP, "--host", node.socket, "status"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    return next((line for line in said.splitlines() if line.startswith("store")), said)


def warnings(node: TestNode) -> str:
    found = node.client().info()["Warnings"]
    return " ".join(one for one in found or () if "store" in one)


def etcd_of(node: TestNode) -> Path:
    """The socket of a manager's own member."""
    (manager,) = node.pids("skep-manager")
    return Path(f"/proc/{manager}/root/run/skep/etcd.sock")


async def spaces(cluster: TestCluster) -> Mapping[str, tuple[int, bool]]:
    """Manager -> MiB of its file, and whether its etcd refuses plain writes."""
    found: dict[str, tuple[int, bool]] = {}
    for name in MANAGERS:
        async with EtcdClient(etcd_of(cluster.node(name))) as client:
            status = await client.status()
            found[name] = status.db_size >> 20, any("NOSPACE" in error for error in status.errors)
    return found


async def overfill(node: TestNode) -> None:
    """As no part of Skep writes: what etcd counts, until it refuses."""
    async with EtcdClient(etcd_of(node)) as client:
        for _ in range(100):
            put = pb.PutRequest(key=b"/raw", value=os.urandom(1_000_000))
            try:
                await client.call("KV/Put", pb.PutResponse, put, 10.0)
            except OutOfSpace:
                return
    pytest.fail("etcd never refused")


def reported(cluster: TestCluster) -> list[dict[str, Any]]:
    """What the managers wrote about their space, in order of time."""
    lines = (
        {**line, "from": name}
        for name in MANAGERS
        for line in _lines(cluster.directory / name / "skep.log")
        if line.get("event") in (DEFRAGMENTING, "store defragmented")
    )
    return sorted(lines, key=lambda line: str(line["timestamp"]))


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(errors="replace").splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict):
            yield said


DEFRAGMENTING = "defragmenting a store, which pauses its service"


def ids(seen_by: TestNode) -> Mapping[str, str]:
    """Node id -> host name."""
    return {node["ID"]: node["Description"]["Hostname"] for node in seen_by.client().api.nodes()}


def assert_one_at_a_time_and_never_the_leaders_own(
    said: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> None:
    """What each leader wrote: a store stands still, then it is done, then the next one."""
    leaders = set()
    for before, line in pairwise(({"event": "", "from": ""}, *said)):
        if line["event"] == DEFRAGMENTING:
            leaders.add(line["from"])
            assert names[line["node"]] != line["from"], f"the leader's own, while it leads: {line}"
            assert before["event"] != DEFRAGMENTING or before["from"] != line["from"], (before, line)
    assert len(leaders) > 1, "the leader's own store was one of those, so another one led"


def assert_one_that_ends_is_replaced(node: TestNode, service: str) -> None:
    """What the cluster itself writes is taken."""
    (before,) = wait_running(node, service, 1)
    for one in node.cluster.nodes():
        for container in containers(one, service):
            one.client().api.kill(container["Id"])

    def is_replaced() -> bool:
        return bool((now := running(node, service)) and now[0]["ID"] != before["ID"])

    wait_until(is_replaced, "another task runs in its place", 60)


def remove_configs(node: TestNode, names: list[str]) -> None:
    """Each as soon as it goes: leadership moves meanwhile."""

    def removed(name: str) -> bool:
        try:
            node.client().api.remove_config(name)
        except (DockerException, RequestException) as error:
            return "not found" in str(error)
        return True

    for name in names:
        wait_until(lambda name=name: removed(name), f"{name} is removed", 60)  # type: ignore[misc]


def test_a_store_that_is_driven_to_its_quota_comes_back_by_itself() -> None:
    configured = dict.fromkeys(MANAGERS, f'store-quota = "{QUOTA_MIB}MiB"\n')
    with a_playground("quota", configured=configured, managers=3, workers=1) as cluster:
        m1, m2 = cluster.node("m1"), cluster.node("m2")
        wait_managers(m1, *MANAGERS)
        create(m1, "web", 4)
        create(m1, "mortal", 1, "--restart-delay", "0s")
        tasks = {task["ID"] for task in wait_running(m1, "web", 4)}

        taken, why = until_refused(m2)
        assert f"of {QUOTA_MIB}.0 MiB): remove configs, secrets or services that are not needed" in why
        assert " % full" in status(m1), status(m1)
        assert "the cluster's store is" in warnings(m2)
        asyncio.run(overfill(m1))
        wait_until(lambda: "has reached its quota" in warnings(m1), "the quota is said to be reached")
        assert_one_that_ends_is_replaced(m1, "mortal")

        remove_configs(m2, taken)
        wait_until(lambda: not put_config(m2, "again"), "a config is taken again", MADE_WITHIN_S)
        wait_until(
            lambda: all(
                size < QUOTA_MIB // 2 and not has_alarm
                for size, has_alarm in asyncio.run(spaces(cluster)).values()
            ),
            "every file is small, and no alarm stands",
            MADE_WITHIN_S,
        )
        wait_managers(m1, *MANAGERS)
        assert_one_at_a_time_and_never_the_leaders_own(reported(cluster), ids(m1))
        m2.docker("service", "update", "--detach", "--label-add", "a=b", "web")
        assert tasks == {task["ID"] for task in running(m1, "web")}, "nothing moved"
        assert not warnings(m1)
        assert "again" in {config["Spec"]["Name"] for config in m1.client().api.configs()}
