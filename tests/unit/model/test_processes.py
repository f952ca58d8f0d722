"""Which services may run programs of their nodes (``skep.executor=process``)."""

from typing import Any

import pytest

from skep.errors import InvalidArgument
from skep.manager.control.validation.service_rules import check_service_spec
from skep.model.container import ContainerSpec
from skep.model.permissions.field_rights import admin_rights
from skep.model.permissions.processes import is_empty_image
from skep.model.service import ServiceSpec, TaskSpec

DIGEST = f"sha256:{'e' * 64}"


def a_process(labels: dict[str, str] | None = None, **fields: Any) -> ServiceSpec:
    container = ContainerSpec(
        **{"image": "scratch", "args": ("true",), **fields},
        labels={"skep.executor": "process", **(labels or {})},
    )
    return ServiceSpec(name="web", task_template=TaskSpec(container_spec=container))


@pytest.mark.parametrize(
    "image", ["scratch", "scratch:latest", f"scratch:latest@{DIGEST}", "docker.io/library/scratch"]
)
def test_the_image_is_dockers_empty_one_in_any_spelling(image: str) -> None:
    check_service_spec(a_process(image=image))


@pytest.mark.parametrize("image", ["busybox", "my/scratch", "scratch:1", "r.example/scratch", "scratchy"])
def test_another_image_is_not_ignored(image: str) -> None:
    assert not is_empty_image(image)
    with pytest.raises(InvalidArgument, match=f"not of the image {image}: use the image scratch"):
        check_service_spec(a_process(image=image))


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"labels": {"skep.privileged": "true"}}, "skep.privileged"),
        ({"labels": {"skep.pid": "host"}}, "skep.pid"),
        ({"labels": {"skep.ipc": "host"}}, "skep.ipc"),
        ({"capability_add": ("CAP_NET_RAW",)}, r"capabilities \(CAP_NET_RAW\)"),
        ({"user": "root"}, "the user or group root"),
        ({"user": "00"}, "the user or group root"),
        ({"user": "www-data:0"}, "the user or group root"),
        ({"groups": ("users", "root")}, "the user or group root"),
    ],
)
def test_what_would_open_the_node_is_refused_by_name(fields: dict[str, Any], option: str) -> None:
    with pytest.raises(InvalidArgument, match=f"skep.executor=process does not work with {option}: remove"):
        check_service_spec(a_process(**fields))


def test_a_process_needs_a_command() -> None:
    check_service_spec(a_process(args=(), command=("true",)))
    with pytest.raises(InvalidArgument, match="needs a command"):
        check_service_spec(a_process(args=()))


def test_everything_else_is_as_in_a_container() -> None:
    check_service_spec(
        a_process({"skep.shm-size": "1g", "skep.uts": "host"}, user="1000:1000", groups=("adm",), init=True)
    )


def test_other_executors_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"invalid label skep\.executor=oci: expected process"):
        check_service_spec(a_process({"skep.executor": "oci"}))


def test_only_administrators_may_run_programs_of_the_nodes() -> None:
    assert list(admin_rights(a_process())) == ["rights over its machine (processes)"]
