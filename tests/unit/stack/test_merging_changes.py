"""A deploy applies the differences of its plan to what is there when it writes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.model.container import ContainerSpec, SecretFileTarget, SecretReference
from skep.model.options.autoscaling import with_replicas
from skep.model.service import ReplicatedService, ServiceMode, ServiceSpec, TaskSpec
from skep.model.values.ids import SecretId
from skep.stack.planning import is_still, merged


def a_spec(
    image: str = "web:1",
    replicas: int = 2,
    env: tuple[str, ...] = (),
    labels: dict[str, str] | None = None,
    force: int = 0,
) -> ServiceSpec:
    return ServiceSpec(
        name="web",
        labels=labels or {},
        mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)),
        task_template=TaskSpec(container_spec=ContainerSpec(image=image, env=env), force_update=force),
    )


FIELDS = {
    "image": st.sampled_from(["web:1", "web:2"]),
    "replicas": st.integers(0, 3),
    "env": st.sampled_from([(), ("A=1",), ("A=1", "B=2")]),
    "labels": st.dictionaries(st.sampled_from("ab"), st.sampled_from("12")),
    "force": st.integers(0, 2),
}
SPECS = st.fixed_dictionaries(FIELDS)


@given(SPECS, SPECS, SPECS)
def test_a_field_that_the_plan_changes_is_the_plans_and_every_other_is_the_present_one(
    before: dict[str, Any], wanted: dict[str, Any], present: dict[str, Any]
) -> None:
    expected = {key: present[key] if before[key] == wanted[key] else wanted[key] for key in FIELDS}
    labels = {
        key: value
        for key in "ab"
        for kept in [before["labels"].get(key) == wanted["labels"].get(key)]
        if (value := (present if kept else wanted)["labels"].get(key)) is not None
    }
    found = merged(a_spec(**before), a_spec(**wanted), a_spec(**present))
    assert found == a_spec(**{**expected, "labels": labels})


@given(SPECS, SPECS)
def test_nothing_else_changed_gives_what_is_wanted_and_nothing_wanted_what_is_there(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    before, wanted = a_spec(**one), a_spec(**other)
    assert merged(before, wanted, before) == wanted
    assert merged(before, before, wanted) == wanted
    assert merged(before, wanted, wanted) == wanted, "a repeated request changes nothing"


def test_a_rotation_beside_a_deploy_of_another_image_stays() -> None:
    def with_secret(spec: ServiceSpec, name: str, id: str = "") -> ServiceSpec:
        container = spec.task_template.container_spec
        assert container is not None
        file = SecretFileTarget(name="password")
        secrets = (SecretReference(file=file, secret_id=SecretId(id), secret_name=name),)
        container = replace(container, secrets=secrets)
        return replace(spec, task_template=replace(spec.task_template, container_spec=container))

    before, rotated = with_secret(a_spec(), "db", "s1"), with_secret(a_spec(), "db-v2", "s2")
    found = merged(before, with_secret(a_spec("web:2"), "db"), rotated)
    assert found == with_secret(a_spec("web:2"), "db-v2", "s2")
    other = with_secret(a_spec(), "other")
    assert merged(before, other, rotated) == other, "a secret that the file changes is the file's"


def test_the_number_of_tasks_stays_the_autoscalers_also_where_the_file_names_another() -> None:
    labels = {"skep.autoscale": "2..20"}
    before = a_spec(replicas=5, labels=labels)
    found = merged(before, a_spec("web:2", replicas=3, labels=labels), with_replicas(before, 10))
    assert found == a_spec("web:2", replicas=10, labels=labels)


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (a_spec(), True),
        (a_spec(force=3), True),
        (a_spec(replicas=3), False),
        (a_spec("web:2"), False),
    ],
)
def test_a_service_is_still_the_same_while_only_managers_have_changed_it(
    present: ServiceSpec, *, expected: bool
) -> None:
    assert is_still(a_spec(), present) == expected


def test_the_autoscalers_number_makes_no_other_service() -> None:
    labels = {"skep.autoscale": "2..20"}
    assert is_still(a_spec(labels=labels), replace(a_spec(labels=labels), mode=a_spec(replicas=9).mode))
