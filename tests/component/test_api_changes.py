"""Changes of the Engine API since 1.48 in what a node's engine serves, one test for each entry of the checklist.

``docs/conformance/api-changes.md`` is the checklist.
"""

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from skep.api.http.versions import ApiVersion
from skep.engine.containers import create
from skep.engine.containers.request import create_warnings, read_connect, read_create, read_update
from skep.engine.engine import Engine
from skep.engine.images.image import ContainerDefaults
from skep.errors import SkepError
from skep.model.values.meta import Driver
from tests.support.engine.image_node import (
    HERE,
    LAYER,
    OTHER,
    Api,
    answer,
    asking_for,
    image_api,
    image_engine,
    load_image,
)
from tests.support.images.archives import a_config, a_file, a_tar


@pytest.fixture
async def engine(tmp_path: Path) -> Engine:
    return await image_engine(tmp_path)


@pytest.fixture
async def api(engine: Engine, tmp_path: Path) -> AsyncIterator[Api]:
    """A client of a node that has the image app:1."""
    async with image_api(engine, tmp_path) as api:
        yield api


def as_query(*platforms: Mapping[str, str], name: str = "platform") -> str:
    return "&".join(f"{name}={json.dumps(one)}" for one in platforms)


# --- 1.48 -----------------------------------------------------------------------------------------------------


async def test_1_48_the_history_of_an_image_is_shown_for_its_platform_only(api: Api) -> None:
    assert (await answer(api, f"/v1.48/images/app:1/history?{as_query(HERE)}"))[0] == 200
    status, shown = await answer(api, f"/v1.48/images/app:1/history?{as_query(OTHER)}")
    assert status == 404
    assert "does not match the specified platform (linux/s390x)" in shown["message"]
    assert (await answer(api, f"/v1.47/images/app:1/history?{as_query(OTHER)}"))[0] == 200
    assert (await answer(api, "/v1.48/images/app:1/history?platform=linux/s390x"))[0] == 400


async def test_1_48_an_image_is_saved_for_its_platform_only(api: Api) -> None:
    assert (await api.get(f"/v1.48/images/app:1/get?{as_query(HERE)}")).status == 200
    assert (await api.get(f"/v1.48/images/get?names=app:1&{as_query(OTHER)}")).status == 404
    assert (await api.get(f"/v1.47/images/get?names=app:1&{as_query(OTHER)}")).status == 200


async def test_1_48_only_images_of_the_platform_are_loaded(api: Api) -> None:
    said = await load_image(api, f"/v1.48/images/load?{as_query(HERE)}", OTHER, "other:1")
    assert f"the archive has no image for platform linux/{HERE['architecture']}" in said
    assert (await answer(api, "/images/other:1/json"))[0] == 404
    assert "Loaded image: other:1" in await load_image(
        api, f"/v1.48/images/load?{as_query(OTHER)}", OTHER, "other:1"
    )


async def test_1_48_one_platform_is_accepted(api: Api) -> None:
    for path in ("/v1.48/images/app:1/get", "/v1.48/images/get"):
        status, shown = await answer(api, f"{path}?{as_query(HERE, OTHER)}")
        assert (status, shown["message"].partition(";")[0]) == (
            400,
            "multiple platform parameters are not supported in this API version",
        )


async def test_1_48_images_have_no_manifests_of_other_platforms(api: Api) -> None:
    _, shown = await answer(api, "/v1.48/images/app:1/json?manifests=true")
    _, (line,) = await answer(api, "/v1.48/images/json?manifests=true")
    assert {"Descriptor", "Manifests"}.isdisjoint({*shown, *line})


async def test_1_48_debug_paths_of_go_programs_are_not_served(api: Api) -> None:
    assert await answer(api, "/v1.48/debug/vars") == (404, {"message": "page not found"})


async def test_1_48_progress_messages_keep_their_deprecated_fields(api: Api) -> None:
    broken = await api.post("/v1.48/images/load", data=a_tar(a_file("manifest.json", b"null")))
    error = json.loads((await broken.text()).splitlines()[-1])
    assert error["error"] == error["errorDetail"]["message"]


def test_1_48_a_volume_driver_beside_mounts_gets_a_warning() -> None:
    def warnings(version: str, **options: Any) -> list[str]:
        mount = {"Type": "volume", "Source": "v", "Target": "/v", **options}
        body = {"Image": "i", "HostConfig": {"VolumeDriver": "local", "Mounts": [mount]}}
        return create_warnings(read_create(json.dumps(body).encode()), ApiVersion(version))

    (warning,) = warnings("1.48")
    assert "volume-driver configuration is ignored for volumes specified via 'mount'" in warning
    assert warnings("1.47") == []
    assert warnings("1.48", VolumeOptions={"DriverConfig": {"Name": "local"}}) == []
    assert warnings("1.48", Type="tmpfs", Source="") == []


def test_1_48_a_gateway_priority_of_a_predefined_network_is_refused_by_name() -> None:
    for mode, name in (("bridge", "bridge"), ("default", "default"), ("", "bridge"), ("none", "none")):
        with pytest.raises(SkepError, match="GwPriority is not supported on network"):
            create.plain_options(asking_for({name: {"GwPriority": 1}}, mode))
    plain = create.plain_options(asking_for({"front": {"GwPriority": 2}, "bridge": {}}, "bridge"))
    assert [(one.network, one.gw_priority) for one in plain.networks] == [("front", 2)]


async def test_1_48_the_gateway_priority_of_each_network_is_shown(api: Api, engine: Engine) -> None:
    request = asking_for({"front": {"GwPriority": 3}, "back": {"GwPriority": -1}})
    await engine.create(request, name="web")
    for path in ("/containers/web/json", "/containers/json?all=1"):
        for version, shown in (("1.48", {"front": 3, "back": -1}), ("1.47", {"front": None, "back": None})):
            _, found = await answer(api, f"/v{version}{path}")
            networks = (found if isinstance(found, dict) else found[0])["NetworkSettings"]["Networks"]
            assert {name: one.get("GwPriority") for name, one in networks.items()} == shown, (version, path)


# --- 1.49 -----------------------------------------------------------------------------------------------------


async def test_1_49_an_image_is_inspected_for_its_platform_only(api: Api) -> None:
    assert (await answer(api, f"/v1.49/images/app:1/json?{as_query(HERE)}"))[0] == 200
    assert (await answer(api, f"/v1.49/images/app:1/json?{as_query(OTHER)}"))[0] == 404
    assert (await answer(api, f"/v1.48/images/app:1/json?{as_query(OTHER)}"))[0] == 200
    conflict = {"message": "conflicting options: manifests and platform options cannot both be set"}
    assert await answer(api, f"/v1.49/images/app:1/json?manifests=1&{as_query(HERE)}") == (400, conflict)


# --- 1.50 -----------------------------------------------------------------------------------------------------


async def test_1_50_an_image_is_removed_for_its_platform_only(api: Api) -> None:
    path = "/v1.50/images/app:1"
    assert (await api.delete(f"{path}?{as_query(OTHER, name='platforms')}")).status == 404
    several = await api.delete(f"{path}?{as_query(HERE, OTHER, name='platforms')}")
    assert (several.status, await several.json()) == (
        400,
        {"message": "multiple platforms are not supported"},
    )
    assert (await answer(api, "/images/app:1/json"))[0] == 200
    assert (await api.delete(f"{path}?{as_query(HERE, name='platforms')}")).status == 200
    assert (await answer(api, "/images/app:1/json"))[0] == 404


async def test_1_50_an_images_configuration_has_no_fields_of_containers(api: Api) -> None:
    older, newer = [
        (await answer(api, f"/v{one}/images/app:1/json"))[1]["Config"] for one in ("1.49", "1.50")
    ]
    gone = {
        "Hostname",
        "Domainname",
        "AttachStdin",
        "AttachStdout",
        "AttachStderr",
        "Tty",
        "OpenStdin",
        "StdinOnce",
    }
    assert set(older) - set(newer) == gone | {"Image"}
    assert newer["Cmd"] == ["sh"]


# --- 1.51 -----------------------------------------------------------------------------------------------------


async def test_1_51_lists_of_images_count_their_containers(api: Api, engine: Engine) -> None:
    for name in ("one", "two"):
        await engine.create(asking_for({}), name=name)
    counts = [
        (await answer(api, f"/v{version}/images/json"))[1][0]["Containers"] for version in ("1.50", "1.51")
    ]
    assert counts == [-1, 2]


async def test_1_51_deprecated_fields_are_still_shown(api: Api, engine: Engine) -> None:
    await engine.create(asking_for({}), name="web")
    _, container = await answer(api, "/v1.51/containers/web/json")
    _, image = await answer(api, "/v1.51/images/app:1/json")
    assert container["NetworkSettings"]["Bridge"] == ""
    assert "KernelMemoryTCP" not in container["HostConfig"]
    assert (image["Parent"], image["DockerVersion"]) == ("", "")


# --- 1.52 -----------------------------------------------------------------------------------------------------


async def test_1_52_several_platforms_are_saved_and_loaded(api: Api) -> None:
    both = as_query(HERE, OTHER)
    assert (await api.get(f"/v1.52/images/app:1/get?{both}")).status == 404, "this node has one of them only"
    assert (await api.get(f"/v1.52/images/app:1/get?{as_query(HERE, HERE)}")).status == 200
    archive = a_tar(
        a_file("l.tar", LAYER),
        *(a_file(f"{one['architecture']}.json", a_config(LAYER, **one)) for one in (HERE, OTHER)),
        a_file(
            "manifest.json",
            json.dumps(
                [
                    {
                        "Config": f"{one['architecture']}.json",
                        "RepoTags": [f"{one['architecture']}:1"],
                        "Layers": ["l.tar"],
                    }
                    for one in (HERE, OTHER)
                ]
            ).encode(),
        ),
    )
    said = await (await api.post(f"/v1.52/images/load?{as_query(OTHER)}", data=archive)).text()
    assert "Loaded image: s390x:1" in said
    assert HERE["architecture"] not in said
    said = await (await api.post(f"/v1.52/images/load?{both}", data=archive)).text()
    assert said.count("Loaded image: ") == 2


async def test_1_52_an_image_omits_what_is_empty(api: Api) -> None:
    (_, older), (_, newer) = [await answer(api, f"/v{one}/images/app:1/json") for one in ("1.51", "1.52")]
    assert set(older) - set(newer) == {"Parent", "Comment", "DockerVersion", "Author"}
    assert set(older["Config"]) - set(newer["Config"]) == {
        "Entrypoint",
        "OnBuild",
        "User",
        "Volumes",
        "WorkingDir",
    }
    assert newer["Config"]["Labels"] == {"test": "yes"}


async def test_1_52_a_container_has_no_obsolete_fields(api: Api, engine: Engine) -> None:
    request = read_create(b'{"Image": "app:1", "MacAddress": "02:42:ac:11:00:02"}')
    await engine.create(request, name="web")
    (_, older), (_, newer) = [await answer(api, f"/v{one}/containers/web/json") for one in ("1.51", "1.52")]
    assert set(newer["NetworkSettings"]) == {"SandboxID", "SandboxKey", "Ports", "Networks"}
    assert len(older["NetworkSettings"]) == 18
    assert set(older["Config"]) - set(newer["Config"]) == {"MacAddress", "OnBuild"}
    assert set(older["HostConfig"]) == set(newer["HostConfig"])


def test_1_52_the_obsolete_limit_of_kernel_memory_is_refused_by_name() -> None:
    with pytest.raises(SkepError, match="do not support kernelmemorytcp"):
        read_create(b'{"HostConfig": {"KernelMemoryTCP": 1}}')
    with pytest.raises(SkepError, match="cannot change kernelmemorytcp"):
        read_update(b'{"KernelMemoryTCP": 1}')


def test_1_52_a_mac_address_belongs_to_a_network() -> None:
    request = read_create(b'{"Image": "i", "MacAddress": "02:42:ac:11:00:02"}')
    assert len(create_warnings(request, ApiVersion("1.51"))) == 1
    with pytest.raises(SkepError, match="container-wide MAC address no longer supported"):
        create_warnings(request, ApiVersion("1.52"))
    of_network = asking_for({"front": {"MacAddress": "02:42:ac:11:00:02"}})
    assert create_warnings(of_network, ApiVersion("1.52")) == []
    assert create.plain_options(of_network).networks[0].mac_address == "02:42:ac:11:00:02"


def test_1_52_an_empty_list_of_port_bindings_means_any_port_and_gets_a_warning() -> None:
    body = {
        "Image": "i",
        "Cmd": ["c"],
        "HostConfig": {"PortBindings": {"80/tcp": [], "81/tcp": [{"HostPort": "8081"}]}},
    }
    request = read_create(json.dumps(body).encode())
    (warning,) = create_warnings(request, ApiVersion("1.52"))
    assert "have an empty list of port-bindings: 80/tcp. " in warning
    assert create_warnings(request, ApiVersion("1.51")) == []
    node = create.NodeDefaults("n", "", Driver(name="json-file"))
    config = create.container_config(request, ContainerDefaults(), None, node)
    assert [(one.target_port, one.published_port) for one in config.ports] == [(80, 0), (81, 8081)]


async def test_1_52_statistics_name_the_system(api: Api, engine: Engine) -> None:
    await engine.create(asking_for({}), name="web")
    path = "containers/web/stats?stream=false"
    assert (await answer(api, f"/v1.52/{path}"))[1]["os_type"] == "linux"
    assert "os_type" not in (await answer(api, f"/v1.51/{path}"))[1]


async def test_1_52_lists_of_containers_have_their_health(api: Api, engine: Engine) -> None:
    await engine.create(asking_for({}), name="web")
    _, (newer,) = await answer(api, "/v1.52/containers/json?all=1")
    _, (older,) = await answer(api, "/v1.51/containers/json?all=1")
    assert newer["Health"] == {"Status": "none", "FailingStreak": 0}
    assert "Health" not in older


async def test_1_52_the_disk_usage_has_numbers_by_type(api: Api, engine: Engine) -> None:
    await engine.create(asking_for({}), name="web")
    engine.volumes.ensure("data")
    legacy = {"LayersSize", "Images", "Containers", "Volumes", "BuildCache"}
    usages = {"ImageUsage", "ContainerUsage", "VolumeUsage", "BuildCacheUsage"}
    assert set((await answer(api, "/v1.51/system/df?verbose=1"))[1]) == legacy
    _, brief = await answer(api, "/v1.52/system/df")
    assert set(brief) == legacy | usages
    size = brief["LayersSize"]
    assert brief["ImageUsage"] == {"ActiveCount": 1, "TotalCount": 1, "TotalSize": size, "Reclaimable": 0}
    assert (brief["ContainerUsage"]["ActiveCount"], brief["ContainerUsage"]["TotalCount"]) == (0, 1)
    assert (brief["VolumeUsage"]["ActiveCount"], brief["VolumeUsage"]["TotalCount"]) == (0, 1)
    _, verbose = await answer(api, "/v1.52/system/df?verbose=1")
    assert set(verbose) == usages
    assert [one["Name"] for one in verbose["VolumeUsage"]["Items"]] == ["data"]
    assert set((await answer(api, "/v1.52/system/df?verbose=1&type=volume"))[1]) == {"VolumeUsage"}


# --- 1.53 to 1.55 ---------------------------------------------------------------------------------------------


async def test_1_53_images_have_no_identity(api: Api) -> None:
    assert "Identity" not in (await answer(api, "/v1.53/images/app:1/json"))[1]


async def test_1_53_the_former_fields_of_the_disk_usage_are_still_there(api: Api) -> None:
    assert {"LayersSize", "Images", "ImageUsage"} <= set((await answer(api, "/v1.53/system/df"))[1])


async def test_1_54_an_identity_needs_manifests(api: Api) -> None:
    conflict = (400, {"message": "conflicting options: identity requires manifests=1"})
    assert await answer(api, "/v1.54/images/json?identity=1") == conflict
    for path in ("/v1.54/images/json?identity=1&manifests=1", "/v1.53/images/json?identity=1"):
        assert (await answer(api, path))[0] == 200


def test_1_54_a_mac_address_is_applied_on_connecting() -> None:
    body = read_connect(b'{"Container": "c", "EndpointConfig": {"MacAddress": "02:42:AC:11:00:02"}}')
    assert create.endpoint_request("front", body.endpoint_config).mac_address == "02:42:ac:11:00:02"


async def test_1_55_attestations_are_refused_by_name(api: Api) -> None:
    status, shown = await answer(api, "/v1.55/images/app:1/attestations")
    assert (status, "keeps no attestations of images" in shown["message"]) == (501, True)
    assert (await answer(api, "/v1.55/images/nosuch:1/attestations"))[0] == 404
    assert await answer(api, "/v1.54/images/app:1/attestations") == (404, {"message": "page not found"})


async def test_1_55_limits_of_devices_are_not_changed_silently(api: Api, engine: Engine) -> None:
    device = {"Path": "/dev/null", "Rate": 1}
    limited = {"Image": "app:1", "HostConfig": {"BlkioDeviceReadBps": [device]}}
    for name, body in (("web", limited), ("free", {"Image": "app:1"})):
        await engine.create(read_create(json.dumps(body).encode()), name=name)

    async def update(name: str, version: str, value: Any) -> tuple[int, str]:
        path = f"/v{version}/containers/{name}/update"
        response = await api.post(path, json={"BlkioDeviceReadBps": value})
        return response.status, (await response.json()).get("message", "")

    refused = "docker update cannot change blkiodevicereadbps: omit it"
    for version in ("1.54", "1.55"):
        assert await update("web", version, [device]) == (501, refused)
        assert (await update("web", version, None))[0] == (await update("free", version, []))[0] == 200
    assert (await update("web", "1.54", []))[0] == 200
    cleared = "docker update cannot clear blkiodevicereadbps: create the container again without it"
    assert await update("web", "1.55", []) == (501, cleared)
