"""``/volumes`` of a node: its own, and on a manager those of the cluster, in Docker's form and with its words."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from skep.model.secret import Secret
from skep.model.task import TaskState, VolumeAttachment
from skep.model.values.ids import NodeId
from skep.model.volume import PublishState, PublishStatus, Volume
from skep.store.interface import Transaction
from skep.store.level import CLUSTER_VOLUMES, LOWEST
from tests.support.builders import a_task
from tests.support.networks.network_rigs import Rig, a_rig

MOUNT: dict[str, Any] = {"Scope": "single", "Sharing": "none", "MountVolume": {}}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with a_rig(tmp_path) as made:
        await made.manager.store.update(lambda tx: tx.raise_level(CLUSTER_VOLUMES))
        yield made


def a_body(name: str = "data", **spec: Any) -> dict[str, Any]:
    return {"Name": name, "Driver": "d.example", "ClusterVolumeSpec": {"AccessMode": MOUNT, **spec}}


async def created(rig: Rig, name: str = "data", **spec: Any) -> dict[str, Any]:
    status, shown = await rig.ask("POST", "/volumes/create", a_body(name, **spec))
    assert status == 201, shown
    return dict(shown)


async def change(rig: Rig, name: str, **fields: Any) -> None:
    def put(tx: Transaction) -> None:
        tx.put(replace(tx.resolve(Volume, name), **fields))

    await rig.manager.store.update(put)


async def test_a_cluster_volume_is_shown_as_docker_shows_it(rig: Rig) -> None:
    body = a_body(
        Group="g",
        CapacityRange={"RequiredBytes": 5, "LimitBytes": 9},
        AccessibilityRequirements={"Requisite": [{"Segments": {"zone": "a"}}]},
    )
    status, shown = await rig.ask(
        "POST", "/volumes/create", {**body, "Labels": {"a": "b"}, "DriverOpts": {"x": "y"}}
    )
    assert status == 201
    cluster = shown.pop("ClusterVolume")
    assert shown.pop("CreatedAt").endswith(" +0000 UTC")
    assert shown == {
        "Driver": "d.example",
        "Labels": {"a": "b"},
        "Mountpoint": "",
        "Name": "data",
        "Options": {"x": "y"},
        "Scope": "global",
        "Status": {"State": "to be created by its driver"},
    }
    assert cluster["Version"]["Index"] > 0
    assert cluster["Spec"] == {
        "Group": "g",
        "AccessMode": MOUNT,
        "AccessibilityRequirements": {"Requisite": [{"Segments": {"zone": "a"}}]},
        "CapacityRange": {"RequiredBytes": 5, "LimitBytes": 9},
        "Availability": "active",
    }
    for word in ("data", cluster["ID"], cluster["ID"][:6]):
        status, again = await rig.ask("GET", f"/volumes/{word}")
        assert (status, again["ClusterVolume"]["ID"]) == (200, cluster["ID"])


async def test_published_nodes_and_reasons_are_shown(rig: Rig) -> None:
    await created(rig)
    status = PublishStatus(node_id=NodeId("n9"), state=PublishState.PUBLISHED, publish_context={"p": "1"})
    pending = PublishStatus(node_id=NodeId("n8"), message="no")
    await change(rig, "data", publish_status=(pending, status), message="driver d.example not found")
    _, shown = await rig.ask("GET", "/volumes/data")
    assert shown["ClusterVolume"]["PublishStatus"] == [
        {"NodeID": "n8", "State": "pending-publish"},
        {"NodeID": "n9", "State": "published", "PublishContext": {"p": "1"}},
    ]
    assert shown["Status"]["Message"] == "driver d.example not found"
    assert shown["Status"]["Nodes"] == {"n8": "no"}


async def test_a_nodes_own_volumes_come_first(rig: Rig) -> None:
    await rig.ask("POST", "/volumes/create", {"Name": "data"})
    await created(rig)
    await created(rig, "other")
    _, shown = await rig.ask("GET", "/volumes")
    assert [(one["Name"], "ClusterVolume" in one) for one in shown["Volumes"]] == [
        ("data", False),
        ("data", True),
        ("other", True),
    ]
    _, shown = await rig.ask("GET", "/volumes/data")
    assert shown["Driver"] == "local"
    _, shown = await rig.ask("GET", '/volumes?filters={"driver":["d.example"],"name":["oth"]}')
    assert [one["Name"] for one in shown["Volumes"]] == ["other"]


async def test_older_clients_and_workers_see_the_nodes_own_only(rig: Rig) -> None:
    await created(rig)
    assert (await rig.ask("GET", "/v1.41/volumes"))[1]["Volumes"] == []
    assert (await rig.ask("GET", "/v1.41/volumes/data"))[0] == 404
    rig.member.is_manager = False
    assert (await rig.ask("GET", "/volumes"))[1]["Volumes"] == []
    assert (await rig.ask("GET", "/volumes/data"))[0] == 404
    status, message = await rig.message("POST", "/volumes/create", a_body("x"))
    assert (status, message.split(".")[0]) == (503, "This node is not a swarm manager")
    only = "volume update only valid for cluster volumes, but swarm is unavailable"
    assert await rig.message("PUT", "/volumes/data?version=1", {}) == (503, only)


async def test_of_a_volume_the_availability_can_be_updated(rig: Rig) -> None:
    version = (await created(rig))["ClusterVolume"]["Version"]["Index"]
    body = {"Spec": {"Availability": "drain"}}
    assert await rig.message("PUT", "/volumes/data?version=x", body) == (
        400,
        "invalid swarm object version 'x': strconv.ParseUint: parsing \"x\": invalid syntax",
    )
    assert (await rig.ask("PUT", f"/volumes/data?version={version}", body))[0] == 200
    _, shown = await rig.ask("GET", "/volumes/data")
    assert shown["ClusterVolume"]["Spec"] == {"AccessMode": MOUNT, "Availability": "drain"}
    assert (await rig.message("PUT", f"/volumes/data?version={version}", body))[1].endswith(
        "update out of sequence"
    )


async def test_a_volume_in_use_is_removed_with_force_only(rig: Rig) -> None:
    shown = await created(rig)
    await change(rig, "data", publish_status=(PublishStatus(node_id=NodeId("n1")),))
    in_use = "rpc error: code = FailedPrecondition desc = volume is still in use"
    assert (await rig.message("DELETE", "/volumes/data"))[1] == in_use
    await change(rig, "data", publish_status=())
    task = a_task("t1", state=TaskState.ASSIGNED)
    attachment = VolumeAttachment(id=shown["ClusterVolume"]["ID"], source="data", target="/d")
    await rig.manager.store.update(lambda tx: tx.put(replace(task, volumes=(attachment,))))
    assert (await rig.message("DELETE", "/volumes/data"))[1] == in_use
    assert (await rig.ask("DELETE", "/volumes/data?force=1"))[0] == 204
    assert not rig.manager.store.view().find(Volume)
    assert (await rig.ask("DELETE", "/volumes/data?force=1"))[0] == 204
    assert (await rig.ask("DELETE", "/volumes/data"))[0] == 404


async def test_a_volume_that_is_removed_waits_for_its_driver(rig: Rig) -> None:
    await created(rig)
    assert (await rig.ask("DELETE", "/volumes/data"))[0] == 204
    _, shown = await rig.ask("GET", "/volumes/data")
    assert shown["Status"]["State"] == "to be deleted by its driver"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CapacityRange": {"RequiredBytes": 50, "LimitBytes": 90}}, "CapacityRange cannot be updated"),
        ({"Group": "other"}, "Group cannot be updated"),
        (
            {"AccessMode": {"Scope": "single", "Sharing": "none", "BlockVolume": {}}},
            "AccessMode cannot be updated",
        ),
        ({"Secrets": [{"Key": "k", "Secret": "s"}]}, "Secrets cannot be updated"),
        (
            {"AccessibilityRequirements": {"Requisite": [{"Segments": {"zone": "a"}}]}},
            "AccessibilityRequirements cannot be updated",
        ),
    ],
)
async def test_a_volume_is_not_expanded_nor_changed_otherwise(
    rig: Rig, change: dict[str, Any], message: str
) -> None:
    await created(rig, Group="g", CapacityRange={"RequiredBytes": 5, "LimitBytes": 9})
    cluster = (await rig.ask("GET", "/volumes/data"))[1]["ClusterVolume"]
    where, shown = f"/volumes/data?version={cluster['Version']['Index']}", cluster["Spec"]
    refused = await rig.message("PUT", where, {"Spec": {**shown, **change}})
    assert refused[0] == 400
    assert refused[1].endswith(message)
    assert (await rig.ask("PUT", where, {"Spec": {**shown, "Availability": "pause"}}))[0] == 200
    after = (await rig.ask("GET", "/volumes/data"))[1]["ClusterVolume"]["Spec"]
    assert after == {**shown, "Availability": "pause"}


async def test_secrets_are_named_or_given_by_id_and_are_kept_while_a_volume_needs_them(rig: Rig) -> None:
    secret = Secret(id="s1")  # type: ignore[arg-type]
    await rig.manager.store.update(lambda tx: tx.put(replace(secret, spec=replace(secret.spec, name="pass"))))
    shown = await created(rig, Secrets=[{"Key": "k", "Secret": "pass"}])
    assert shown["ClusterVolume"]["Spec"]["Secrets"] == [{"Key": "k", "Secret": "s1"}]
    missing = a_body("b", Secrets=[{"Key": "k", "Secret": "no"}, {"Key": "l", "Secret": "nor"}])
    assert (await rig.message("POST", "/volumes/create", missing))[1].endswith("secrets not found: no, nor")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (a_body(""), "meta: name must be provided"),
        (a_body("x" * 129), "can have at most 128 bytes"),
        ({**a_body(), "Driver": ""}, "driver must be specified"),
        (a_body(AccessMode=None), "AccessMode must not be nil"),
        (a_body(AccessMode={}), "Volume AccessMode must specify either Mount or Block access type"),
        (a_body(AccessMode={**MOUNT, "BlockVolume": {}}), "must specify either Mount or Block access type"),
        (a_body(AccessMode={**MOUNT, "Scope": "multi"}), "scope multi needs --sharing"),
        (a_body(AccessMode={**MOUNT, "Sharing": "some"}), "some"),
        (a_body(CapacityRange={"RequiredBytes": -1, "LimitBytes": 0}), "0 or more"),
        (a_body(CapacityRange={"RequiredBytes": 2, "LimitBytes": 1}), "below the required 2 bytes"),
        (a_body(Secrets=[{"Key": "k", "Secret": "a"}, {"Key": "k", "Secret": "b"}]), "have the same key"),
    ],
)
async def test_what_can_never_work_is_refused(rig: Rig, body: dict[str, Any], message: str) -> None:
    status, found = await rig.message("POST", "/volumes/create", body)
    assert status == 400
    assert message in found
    assert not rig.manager.store.view().find(Volume)


async def test_there_are_none_before_all_managers_know_them(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig:
        assert rig.manager.store.view().level == LOWEST
        assert (await rig.message("POST", "/volumes/create", a_body()))[1].endswith(
            "upgrade the others first"
        )


async def test_a_name_is_taken_once(rig: Rig) -> None:
    await created(rig)
    assert (await rig.message("POST", "/volumes/create", a_body()))[0] == 409
