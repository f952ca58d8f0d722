"""fleetctl's commands: units of services, their states, and the services that units make up."""

from typing import Any

import pytest
from click.testing import CliRunner

from skep.cli.apps.fleet import fleet, units_in, whole_services
from skep.errors import InvalidArgument, NotFound

NODES = [
    {"ID": "c9de9451aaaa", "Status": {"State": "ready", "Addr": "10.0.0.1"}, "Spec": {}},
    {"ID": "491586a6bbbb", "Status": {"State": "ready", "Addr": "10.0.0.2"}, "Spec": {}},
]
WEB, DB = "web-id", "db-id"


def a_service(id: str, name: str, stack: str = "", **mode: Any) -> dict[str, Any]:
    labels = {"com.docker.stack.namespace": stack} if stack else None
    return {
        "ID": id,
        "Spec": {"Name": name, "Labels": labels, "Mode": mode or {"Replicated": {"Replicas": 1}}},
    }


def a_task(service: str, slot: int, state: str, node: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "ServiceID": service,
        "Slot": slot,
        "NodeID": NODES[node]["ID"],
        "DesiredState": "running",
        "CreatedAt": "2026-01-01T00:00:00Z",
        "Status": {"State": state},
        **fields,
    }


def lines(services: list[Any], tasks: list[Any], stack: str = "") -> list[str]:
    return [" ".join(one.values()) for one in units_in(services, tasks, NODES, stack)]


def test_a_replicated_service_has_a_unit_per_slot():
    services = [a_service(WEB, "shop_web", "shop", Replicated={"Replicas": 2}), a_service(DB, "db")]
    tasks = [a_task(WEB, 2, "preparing", 1), a_task(WEB, 1, "running"), a_task(DB, 1, "failed")]
    assert lines(services, tasks) == [
        "db.service c9de9451.../10.0.0.1 failed failed",
        "web@1.service c9de9451.../10.0.0.1 active running",
        "web@2.service 491586a6.../10.0.0.2 activating start-pre",
    ]
    assert [line.partition(" ")[0] for line in lines(services, tasks, "shop")] == [
        "web@1.service",
        "web@2.service",
    ]


def test_the_newest_task_that_should_run_counts():
    tasks = [
        a_task(WEB, 1, "running", 1, CreatedAt="2026-01-01T00:00:02Z"),
        a_task(WEB, 1, "failed", 0, CreatedAt="2026-01-01T00:00:01Z"),
        a_task(WEB, 1, "shutdown", 0, CreatedAt="2026-01-01T00:00:03Z", DesiredState="shutdown"),
    ]
    assert lines([a_service(WEB, "web")], tasks) == ["web.service 491586a6.../10.0.0.2 active running"]


def test_a_global_service_has_its_unit_on_each_node():
    tasks = [
        a_task(WEB, 0, "running", 0, Slot=None),
        a_task(WEB, 0, "pending", 1, Slot=None),
    ]
    assert lines([a_service(WEB, "web", Global={})], tasks) == [
        "web.service 491586a6.../10.0.0.2 inactive dead",
        "web.service c9de9451.../10.0.0.1 active running",
    ]


def test_a_stopped_service_is_an_inactive_unit_without_a_machine():
    assert lines([a_service(WEB, "web")], []) == ["web.service - inactive dead"]


@pytest.mark.parametrize(
    "names", [["web@1.service", "web@2.service"], ["web@.service"], ["web"], ["shop_web.service"]]
)
def test_units_make_up_a_service(names):
    services = [a_service(WEB, "shop_web", "shop", Replicated={"Replicas": 2})]
    assert whole_services(names, services, "") == ["shop_web"]


def test_some_of_several_instances_are_refused():
    services = [a_service(WEB, "shop_web", "shop", Replicated={"Replicas": 3})]
    with pytest.raises(
        InvalidArgument, match=r"has 3 instances.*web@\.service.*skep service scale shop_web=N"
    ):
        whole_services(["web@1.service", "web@3.service"], services, "")


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ({"Replicated": {"Replicas": 1}}, ["web@99.service"]),
        ({"Replicated": {"Replicas": 2}}, ["web@7.service", "web@nonsense"]),
        ({"Replicated": {"Replicas": 2}}, ["web@1", "web@2", "web@3"]),
        ({"Replicated": {"Replicas": 2}}, ["web@.service", "web@0"]),
        ({"Global": {}}, ["web@3.service"]),
    ],
)
def test_an_instance_that_does_not_exist_is_refused(mode, names):
    with pytest.raises(NotFound, match=r"there is no unit web@.*[Uu]se web\.service"):
        whole_services(names, [a_service(WEB, "web", **mode)], "")


def test_instances_have_the_slots_that_a_scaling_has_left():
    services = [a_service(WEB, "web", Replicated={"Replicas": 2})]
    tasks = [a_task(WEB, 1, "running"), a_task(WEB, 3, "running")]
    assert whole_services(["web@1", "web@3"], services, "", tasks) == ["web"]


def test_a_unit_of_two_stacks_needs_the_stack():
    services = [a_service(WEB, "shop_web", "shop"), a_service(DB, "blog_web", "blog")]
    with pytest.raises(NotFound, match=r"blog, shop\. Choose one with --stack"):
        whole_services(["web.service"], services, "")
    assert whole_services(["web.service"], services, "blog") == ["blog_web"]
    with pytest.raises(NotFound, match="there is no unit cache"):
        whole_services(["cache.service"], services, "")


def test_other_commands_of_fleetctl_name_their_replacement():
    result = CliRunner().invoke(fleet, ["destroy", "web.service"])
    assert result.exit_code == 2
    assert "Run skep service rm SERVICE" in result.output
