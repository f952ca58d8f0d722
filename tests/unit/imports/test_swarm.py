"""A whole swarm as stack files and a page of steps."""

import base64
from typing import Any

import pytest

from skep.errors import InvalidArgument
from skep.imports.document import read_back
from skep.imports.swarm import SwarmObjects, move_of


def a_service(name: str, stack: str, **container: Any) -> dict[str, Any]:
    labels = {"com.docker.stack.namespace": stack} if stack else {}
    return {
        "ID": name,
        "Spec": {
            "Name": name,
            "Labels": labels,
            "TaskTemplate": {"ContainerSpec": {"Image": "w", **container}, "Networks": [{"Target": "n1"}]},
            "Mode": {"Replicated": {"Replicas": 1}},
        },
    }


SECRET = {
    "SecretName": "key",
    "SecretID": "s1",
    "File": {"Name": "key", "UID": "0", "GID": "0", "Mode": 0o444},
}
CONFIG = {
    "ConfigName": "site",
    "ConfigID": "c1",
    "File": {"Name": "/site", "UID": "0", "GID": "0", "Mode": 0o444},
}
SWARM = SwarmObjects(
    services=(
        a_service(
            "shop_web",
            "shop",
            Secrets=[SECRET],
            Configs=[CONFIG],
            Mounts=[{"Type": "volume", "Source": "shop_data", "Target": "/d"}],
        ),
        a_service("lonely", ""),
    ),
    networks=(
        {
            "Id": "n1",
            "Name": "front",
            "Scope": "swarm",
            "Driver": "overlay",
            "Attachable": True,
            "Options": {"encrypted": ""},
        },
        {"Id": "b", "Name": "bridge", "Scope": "local", "Driver": "bridge"},
        {"Id": "i", "Name": "ingress", "Scope": "swarm", "Driver": "overlay", "Ingress": True},
        {
            "Id": "n2",
            "Name": "unused",
            "Scope": "swarm",
            "Driver": "overlay",
            "EnableIPv6": True,
            "IPAM": {
                "Driver": "default",
                "Config": [
                    {
                        "Subnet": "10.9.0.0/24",
                        "Gateway": "10.9.0.9",
                        "IPRange": "10.9.0.128/25",
                        "AuxiliaryAddresses": {"a": "10.9.0.8"},
                    }
                ],
            },
        },
    ),
    secrets=({"Spec": {"Name": "key; rm -rf /"}}, {"Spec": {"Name": "k", "Labels": {"a": "b c"}}}),
    configs=(
        {
            "Spec": {
                "Name": "site",
                "Data": base64.b64encode(b"\xff\x00hello").decode(),
                "Labels": {"a": "$b"},
            }
        },
        {"Spec": {"Name": "template", "Data": "", "Templating": {"Name": "golang"}}},
        {"Spec": {"Name": "../../etc/passwd", "Data": ""}},
        {"Spec": {"Name": "shop_revision-1", "Labels": {"skep.stack.revision": "1"}, "Data": "aGVsbG8="}},
    ),
    nodes=(
        {
            "ID": "x",
            "Spec": {"Labels": {"zone": "a b"}, "Availability": "drain"},
            "Description": {"Hostname": "w1"},
        },
    ),
)


def test_every_stack_is_a_file_and_the_page_has_what_files_cannot_hold() -> None:
    move = move_of(SWARM)
    assert set(move.files) == {"shop.yaml", "services.yaml", "configs/site", "MOVING.md"}
    assert move.files["configs/site"] == b"\xff\x00hello"
    shop = move.stacks["shop"].document
    assert shop["configs"] == {"site": {"file": "./configs/site", "labels": {"a": "$$b"}}}
    assert shop["networks"] == {"front": {"external": True, "name": "front"}}
    _, report = read_back({**shop, "configs": {"site": {"external": True}}})
    assert not report.problems
    page = move.files["MOVING.md"].decode()
    assert "ingress" not in page
    for line in (
        "docker node update --label-add 'zone=a b' --availability drain w1",
        "docker secret create 'key; rm -rf /' FILE",
        "docker secret create --label 'a=b c' k FILE",
        "docker config create --template-driver golang template FILE",
        "docker config create ../../etc/passwd FILE",
        (
            "docker network create --driver overlay --ipv6 --subnet 10.9.0.0/24 --gateway 10.9.0.9"
            " --ip-range 10.9.0.128/25 --aux-address a=10.9.0.8 unused"
        ),
        "docker network create --driver overlay --attachable --opt encrypted= front",
        "skep stack deploy --compose-file shop.yaml shop",
        "* `shop_data` of the stack shop",
        "The services in `services.yaml` belonged to no stack",
    ):
        assert line in page.split("\n") or line in page, line


def test_names_that_begin_with_a_dash_are_no_options_of_the_steps() -> None:
    nodes = ({"ID": "x", "Spec": {"Role": "manager"}, "Description": {"Hostname": "-m1"}},)
    networks = ({"Id": "n", "Name": "--net", "Scope": "swarm", "Driver": "overlay"},)
    objects = SwarmObjects(secrets=({"Spec": {"Name": "-k"}},), networks=networks, nodes=nodes)
    page = move_of(objects).files["MOVING.md"].decode().split("\n")
    assert "docker secret create -- -k FILE" in page
    assert "docker network create --driver overlay -- --net" in page
    assert "docker node update --role manager -- -m1" in page


def test_a_stack_that_is_called_services_keeps_its_services_apart_from_those_of_no_stack() -> None:
    services = (a_service("services_web", "services"), a_service("web", ""), a_service("x_web", "services-2"))
    move = move_of(SwarmObjects(services=services, networks=SWARM.networks))
    assert {name: list(one.document["services"]) for name, one in move.stacks.items()} == {
        "services": ["web"],
        "services-2": ["x_web"],
        "services-3": ["web"],
    }
    page = move.files["MOVING.md"].decode()
    assert "The services in `services-3.yaml` belonged to no stack" in page
    assert "skep stack deploy --compose-file services.yaml services\n" in page


def test_an_empty_swarm_is_a_page_and_no_file_leaves_the_directory() -> None:
    assert set(move_of(SwarmObjects()).files) == {"MOVING.md"}
    with pytest.raises(InvalidArgument, match="a name that no file can have"):
        move_of(SwarmObjects(services=(a_service("x_web", "../x"),)))


def test_labels_name_a_service_of_no_stack_by_its_new_name_in_all_files() -> None:
    web, db = a_service("shop_web", "shop"), a_service("db", "")
    web["Spec"]["Labels"]["skep.depends-on"] = "db=service_started"
    made = move_of(SwarmObjects(services=(web, db)))
    assert list(made.stacks["services"].document["services"]) == ["db"]
    labels = made.stacks["shop"].document["services"]["web"]["deploy"]["labels"]
    assert labels == {"skep.depends-on": "services_db=service_started"}
