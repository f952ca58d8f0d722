"""No field of the API is dropped: what a client says is stored and returned."""

from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from msgspec import inspect

from skep.api.formats.bodies import decode_body
from skep.manager.routes import application
from skep.model.network import Network
from skep.model.node import Node
from skep.model.secret import Config, Secret
from skep.model.service import Service, ServiceSpec
from skep.model.swarm import InitRequest, JoinRequest, Swarm
from skep.model.task import Task
from skep.model.values.encoding import to_json
from tests.conformance.manager import a_manager_api


def filled(shape: inspect.Type) -> Any:
    """A value with every field of every object set to something that is not its default."""
    match shape:
        case inspect.Metadata():
            return filled(shape.type)
        case inspect.UnionType():
            return filled(next(part for part in shape.types if not isinstance(part, inspect.NoneType)))
        case inspect.StructType():
            return {
                field.encode_name: field.default is not True
                if isinstance(field.type, inspect.BoolType)
                else filled(field.type)
                for field in shape.fields
            }
        case inspect.DictType():
            return {"a": filled(shape.value_type)}
        case inspect.VarTupleType():
            return [filled(shape.item_type)]
        case inspect.EnumType():
            return list(shape.cls)[-1].value
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return 7
        case inspect.FloatType():
            return 0.5
        case inspect.BytesType():
            return "eA=="
        case _:
            return "2026-01-02T03:04:05Z"


@pytest.mark.parametrize(
    "type_",
    [Service, Task, Node, Swarm, Network, Secret, Config, InitRequest, JoinRequest],
    ids=lambda t: t.__name__,
)
def test_every_field_of_an_object_survives_its_json(type_):
    value = filled(inspect.type_info(type_))
    decoded = decode_body(to_json(value), type_)
    assert msgspec.json.decode(to_json(decoded)) == value


SINCE_1_42 = {
    "OomScoreAdj": 5,
    "Healthcheck": {"Test": ["NONE"], "StartInterval": 7_000_000_000},
    "Privileges": {
        "CredentialSpec": None,
        "SELinuxContext": None,
        "Seccomp": {"Mode": "custom", "Profile": "e30="},
        "AppArmor": {"Mode": "disabled"},
        "NoNewPrivileges": True,
    },
    "Mounts": [
        {
            "Type": "bind",
            "Source": "/a",
            "Target": "/b",
            "BindOptions": {
                "Propagation": "rprivate",
                "CreateMountpoint": True,
                "ReadOnlyNonRecursive": True,
                "ReadOnlyForceRecursive": True,
            },
        },
        {"Type": "volume", "Source": "v", "Target": "/c", "VolumeOptions": {"Subpath": "x"}},
        {"Type": "tmpfs", "Target": "/d", "TmpfsOptions": {"Options": [["noexec"], ["size", "1"]]}},
        {"Type": "cluster", "Source": "v", "Target": "/e", "ClusterOptions": {}},
    ],
}
"""What the API has got since 1.41, in a container's spec."""


async def test_a_service_keeps_what_the_api_has_got_since_1_41():
    body = {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "busybox", **SINCE_1_42}}}
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        assert (await client.post("/v1.47/services/create", json=body)).status == 201
        shown = await (await client.get("/v1.47/services/web")).json()
    container = shown["Spec"]["TaskTemplate"]["ContainerSpec"]
    assert container == {"Image": "busybox", "Isolation": "default", **SINCE_1_42}


SINCE_1_52 = {"SwapBytes", "MemorySwappiness"}
SINCE_1_46 = {"OomScoreAdj", "noexec"}
SINCE_1_44 = {"StartInterval", "Seccomp", "AppArmor", '"NoNewPrivileges":true'}
SINCE_1_41 = {"CapabilityAdd", "Ulimits"}
SINCE_1_40 = {"Sysctls", "MaxReplicas"}


@pytest.mark.parametrize(
    ("version", "lost"),
    [
        ("1.52", set()),
        ("1.51", SINCE_1_52),
        ("1.46", SINCE_1_52),
        ("1.45", SINCE_1_52 | SINCE_1_46),
        ("1.44", SINCE_1_52 | SINCE_1_46),
        ("1.43", SINCE_1_52 | SINCE_1_46 | SINCE_1_44),
        ("1.40", SINCE_1_52 | SINCE_1_46 | SINCE_1_44 | SINCE_1_41),
        ("1.39", SINCE_1_52 | SINCE_1_46 | SINCE_1_44 | SINCE_1_41 | SINCE_1_40),
    ],
)
async def test_an_older_version_loses_the_newer_fields_and_no_others(version, lost):
    body = {
        "Name": "web",
        "TaskTemplate": {
            "ContainerSpec": {
                "Image": "busybox",
                "Sysctls": {"a": "b"},
                "CapabilityAdd": ["CAP_CHOWN"],
                "Ulimits": [{"Name": "nofile", "Soft": 1, "Hard": 2}],
                **SINCE_1_42,
            },
            "Placement": {"MaxReplicas": 2},
            "Resources": {"Limits": {"MemoryBytes": 67108864}, "SwapBytes": 0, "MemorySwappiness": 0},
        },
    }
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        assert (await client.post(f"/v{version}/services/create", json=body)).status == 201
        text = await (await client.get("/services/web")).text()
    newer = SINCE_1_52 | SINCE_1_46 | SINCE_1_44 | SINCE_1_41 | SINCE_1_40
    assert {word for word in newer if word not in text} == lost
    spec = msgspec.json.decode(text)["Spec"]
    assert decode_body(to_json(spec), ServiceSpec).name == "web"


@pytest.mark.parametrize(
    ("sent", "shown"), [("0", "0"), ("0.0", "0"), ("1", "1"), ("1.0", "1"), ("0.25", "0.25")]
)
def test_a_ratio_is_written_as_go_writes_it(sent: str, shown: str) -> None:
    """docker 29 prints the JSON of ``docker service inspect`` as it is."""
    body = {"Name": "web", "UpdateConfig": msgspec.Raw(f'{{"MaxFailureRatio":{sent}}}'.encode())}
    spec = decode_body(to_json(body), ServiceSpec)
    assert f'"MaxFailureRatio":{shown}}}' in to_json(spec).decode()
