"""Changes of the Engine API from 1.42 to 1.47 in what a node's engine serves, one test for each entry of the checklist.

``docs/conformance/api-changes.md`` is the checklist.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from skep.engine.containers import create
from skep.engine.containers.request import read_connect
from skep.engine.engine import Engine
from skep.engine.networks.networking import sandbox_config
from skep.errors import SkepError
from skep.model.networks.sandbox import Endpoint, EndpointConfig
from skep.model.networks.tables import NetworkHead
from skep.model.values.ids import NetworkId
from tests.support.engine.image_node import LAYER, OTHER, Api, answer, asking_for, image_api, image_engine
from tests.support.images.archives import a_config, a_docker_archive

MAC = "02:42:ac:11:00:02"
SYSCTL = "net.ipv4.conf.IFNAME.log_martians=1"
OPTION = "com.docker.network.endpoint.sysctls"


@pytest.fixture
async def engine(tmp_path: Path) -> Engine:
    return await image_engine(tmp_path)


@pytest.fixture
async def api(engine: Engine, tmp_path: Path) -> AsyncIterator[Api]:
    async with image_api(engine, tmp_path) as api:
        yield api


async def created(api: Api, version: str, **body: Any) -> tuple[int, Any]:
    response = await api.post(f"/v{version}/containers/create?name=web", json={"Image": "app:1", **body})
    return response.status, await response.json()


# --- 1.42 -----------------------------------------------------------------------------------------------------


async def test_1_42_the_size_of_the_builder_is_gone(api: Api) -> None:
    assert "BuilderSize" in (await answer(api, "/v1.41/system/df"))[1]
    assert "BuilderSize" not in (await answer(api, "/v1.42/system/df"))[1]


async def test_1_42_shared_sizes_are_computed_on_request(api: Api) -> None:
    for query, size in (("", -1), ("?shared-size=1", 0)):
        (line,) = (await answer(api, f"/v1.42/images/json{query}"))[1]
        assert line["SharedSize"] == size


async def test_1_42_the_disk_usage_is_measured_for_several_clients_at_once(api: Api) -> None:
    found = await asyncio.gather(*(answer(api, "/v1.42/system/df") for _ in range(3)))
    assert [status for status, _ in found] == [200, 200, 200]


async def test_1_42_the_limit_of_kernel_memory_is_refused_by_name_and_not_shown(api: Api) -> None:
    status, said = await created(api, "1.42", HostConfig={"KernelMemory": 1 << 26})
    assert (status, "do not support --kernel-memory" in said["message"]) == (501, True)
    assert (await created(api, "1.42"))[0] == 201
    (_, older), (_, newer) = [await answer(api, f"/v{one}/containers/web/json") for one in ("1.41", "1.42")]
    assert set(older["HostConfig"]) - set(newer["HostConfig"]) == {"KernelMemory", "KernelMemoryTCP"}


async def test_1_42_a_container_has_a_size_of_its_terminal(api: Api, engine: Engine) -> None:
    for version, size in (("1.41", [0, 0]), ("1.42", [30, 90])):
        assert (await created(api, version, Tty=True, HostConfig={"ConsoleSize": [30, 90]}))[0] == 201
        _, shown = await answer(api, f"/v{version}/containers/web/json")
        assert shown["HostConfig"]["ConsoleSize"] == size
        await engine.remove(shown["Id"])


async def test_1_42_caches_of_builds_have_no_parents(api: Api, tmp_path: Path) -> None:
    (tmp_path / "cache" / ("a" * 64)).mkdir(parents=True)
    for version in ("1.41", "1.42"):
        (cache,) = (await answer(api, f"/v{version}/system/df"))[1]["BuildCache"]
        assert {"Parent", "Parents"}.isdisjoint(cache)


async def test_1_42_the_source_of_a_bind_mount_is_made_on_request(api: Api, tmp_path: Path) -> None:
    source = tmp_path / "source"
    mount = {"Type": "bind", "Source": str(source), "Target": "/t"}
    status, said = await created(api, "1.42", HostConfig={"Mounts": [mount]})
    assert (status, "bind source path does not exist" in said["message"]) == (400, True)
    mount["BindOptions"] = {"CreateMountpoint": True}
    assert (await created(api, "1.42", HostConfig={"Mounts": [mount]}))[0] == 201
    assert source.is_dir()


@pytest.mark.parametrize(
    ("type", "options"),
    [("volume", "BindOptions"), ("tmpfs", "VolumeOptions"), ("bind", "TmpfsOptions")],
)
async def test_1_42_options_of_another_type_of_mount_are_refused(api: Api, type: str, options: str) -> None:
    mount = {"Type": type, "Source": "" if type == "tmpfs" else "/etc", "Target": "/t", options: {}}
    for version in ("1.41", "1.42"):
        refused = (400, {"message": f'{options} must not be specified on mount type "{type}"'})
        assert await created(api, version, HostConfig={"Mounts": [mount]}) == refused


# --- 1.43 -----------------------------------------------------------------------------------------------------


async def test_1_43_images_without_names_have_empty_lists(api: Api) -> None:
    archive = a_docker_archive(LAYER, tags=[], config=a_config(LAYER, os="linux", comment="nameless"))
    assert (await api.post("/images/load", data=archive)).status == 200
    for version, names in (("1.42", ["<none>:<none>"]), ("1.43", [])):
        _, lines = await answer(api, f"/v{version}/images/json?all=1")
        assert names in [line["RepoTags"] for line in lines]


# --- 1.44 -----------------------------------------------------------------------------------------------------


async def test_1_44_images_are_listed_by_their_age(api: Api) -> None:
    for moment, number in (("2001-01-01", 0), ("2100-01-01", 1)):
        _, lines = await answer(api, f'/v1.44/images/json?filters={{"until":["{moment}"]}}')
        assert len(lines) == number
    assert (await answer(api, '/v1.44/images/json?filters={"until":["x"]}'))[0] == 400


async def test_1_44_images_have_no_virtual_size(api: Api) -> None:
    for path in ("images/app:1/json", "images/json", "system/df"):
        assert "VirtualSize" in json.dumps((await answer(api, f"/v1.43/{path}"))[1])
        assert "VirtualSize" not in json.dumps((await answer(api, f"/v1.44/{path}"))[1])


async def test_1_44_an_image_without_a_date_has_no_created(api: Api) -> None:
    archive = a_docker_archive(LAYER, tags=["old:1"], config=a_config(LAYER, os="linux", created=None))
    assert (await api.post("/images/load", data=archive)).status == 200
    assert (await answer(api, "/v1.43/images/old:1/json"))[1]["Created"] == "0001-01-01T00:00:00Z"
    assert "Created" not in (await answer(api, "/v1.44/images/old:1/json"))[1]


async def test_1_44_health_checks_have_an_interval_while_the_container_starts(api: Api) -> None:
    check = {"Test": ["CMD", "true"], "StartInterval": 2_000_000_000}
    assert (await created(api, "1.44", Healthcheck=check))[0] == 201
    assert (await answer(api, "/v1.44/containers/web/json"))[1]["Config"]["Healthcheck"] == check


async def test_1_44_a_container_is_created_on_several_networks(api: Api, engine: Engine) -> None:
    await engine.create(asking_for({"front": {}, "back": {}}), name="web")
    _, shown = await answer(api, "/v1.44/containers/web/json")
    assert list(shown["NetworkSettings"]["Networks"]) == ["front", "back"]


async def test_1_44_wrong_addresses_are_found_when_the_container_is_created(api: Api) -> None:
    ipam = {"IPAMConfig": {"IPv4Address": "nowhere"}}
    networking = {"EndpointsConfig": {"front": ipam}}
    wrong = await created(api, "1.44", HostConfig={"NetworkMode": "front"}, NetworkingConfig=networking)
    assert wrong == (400, {"message": "invalid IPv4 address: nowhere"})


async def test_1_44_a_mac_address_of_the_whole_container_gets_a_warning(api: Api, engine: Engine) -> None:
    said = "The container-wide MacAddress field is now deprecated. It should be specified in EndpointsConfig instead."
    for version, warnings in (("1.43", []), ("1.44", [said]), ("1.51", [said])):
        status, shown = await created(api, version, MacAddress=MAC)
        assert (status, shown["Warnings"]) == (201, warnings)
        await engine.remove(shown["Id"])


def test_1_44_each_network_has_a_mac_address() -> None:
    plain = create.plain_options(asking_for({"front": {"MacAddress": MAC}, "back": {}}))
    assert [one.mac_address for one in plain.networks] == [MAC, ""]


# --- 1.45 -----------------------------------------------------------------------------------------------------


async def test_1_45_an_image_names_no_container(api: Api) -> None:
    (_, older), (_, newer) = [await answer(api, f"/v{one}/images/app:1/json") for one in ("1.44", "1.45")]
    assert set(older) - set(newer) == {"Container", "ContainerConfig"}


# --- 1.46 -----------------------------------------------------------------------------------------------------


async def test_1_46_lists_of_containers_have_their_annotations(api: Api) -> None:
    assert (await created(api, "1.46", HostConfig={"Annotations": {"a": "b"}}))[0] == 201
    for version, shown in (("1.45", {}), ("1.46", {"Annotations": {"a": "b"}})):
        (line,) = (await answer(api, f"/v{version}/containers/json?all=1"))[1]
        assert line["HostConfig"] == {"NetworkMode": "default", **shown}


async def test_1_46_an_image_is_pushed_for_its_platform_only(api: Api) -> None:
    response = await api.post("/v1.46/images/app/push", params={"tag": "1", "platform": json.dumps(OTHER)})
    assert response.status == 404
    assert "does not match the specified platform (linux/s390x)" in (await response.json())["message"]


def an_endpoint(interface: str, sysctls: str) -> Endpoint:
    head = NetworkHead(id=NetworkId("n1"), name="front")
    config = EndpointConfig(head=head, addresses=("10.0.0.2/24",), sysctls=sysctls)
    return Endpoint(config=config, interface=interface, port="p", mac_address=MAC)


def test_1_46_an_interface_has_sysctls_of_its_own() -> None:
    for name in ("IFNAME", "ifname"):
        options = {"DriverOpts": {OPTION: SYSCTL.replace("IFNAME", name)}}
        (network,) = create.plain_options(asking_for({"front": options})).networks
        assert an_endpoint("eth1", network.sysctls).sysctls == {"net.ipv4.conf.eth1.log_martians": "1"}
    assert an_endpoint("eth0", "").sysctls == {}


@pytest.mark.parametrize(
    "text",
    [
        "net.ipv4.conf.eth0.log_martians=1",
        "net.core.somaxconn.IFNAME.x=1",
        "net.ipv4.conf.IFNAME./../x=1",
        "net.ipv4.conf.IFNAME.x",
        f"{SYSCTL},",
    ],
)
def test_1_46_what_is_no_sysctl_of_an_interface_is_refused(text: str) -> None:
    with pytest.raises(SkepError, match="unrecognised network interface sysctl"):
        create.plain_options(asking_for({"front": {"DriverOpts": {OPTION: text}}}))


@pytest.mark.parametrize(
    ("options", "mode", "said"),
    [
        ({OPTION: SYSCTL}, "bridge", "is not supported on network bridge: use --sysctl"),
        ({OPTION: SYSCTL, "other": "x"}, "front", "do not support --network driver-opt"),
    ],
)
def test_1_46_other_driver_options_and_predefined_networks_are_refused_by_name(
    options: Mapping[str, str], mode: str, said: str
) -> None:
    with pytest.raises(SkepError, match=said):
        create.plain_options(asking_for({mode: {"DriverOpts": options}}, mode))


async def test_1_46_sysctls_of_an_interface_are_shown_and_kept(api: Api, engine: Engine) -> None:
    container = await engine.create(asking_for({"front": {"DriverOpts": {OPTION: SYSCTL}}}), name="web")
    _, shown = await answer(api, "/v1.46/containers/web/json")
    assert shown["NetworkSettings"]["Networks"]["front"]["DriverOpts"] == {OPTION: SYSCTL}
    body = read_connect(json.dumps({"EndpointConfig": {"DriverOpts": {OPTION: SYSCTL}}}).encode())
    await engine.networks.connect(container.id, create.endpoint_request("back", body.endpoint_config))
    asked = sandbox_config(engine.get(container.id)).networks
    assert [(one.network, one.sysctls) for one in asked] == [("front", SYSCTL), ("back", SYSCTL)]
