"""Secrets as environment variables: what the label says, and what is refused."""

import pytest

from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec, SecretFileTarget, SecretReference
from skep.model.options.secret_env import (
    SECRET_ENV_LABEL,
    VALUE_BYTES_MAX,
    VARIABLES_MAX,
    check_secret_env,
    environment_entry,
    secret_env_warning,
    secret_variables,
)
from skep.model.values.ids import SecretId


def a_container(label: str, *targets: str, env: tuple[str, ...] = ()) -> ContainerSpec:
    secrets = tuple(
        SecretReference(
            file=SecretFileTarget(name=target),
            secret_id=SecretId(f"id of {target}"),
            secret_name=f"{target}-v2",
        )
        for target in targets
    )
    labels = {SECRET_ENV_LABEL: label} if label else {}
    return ContainerSpec(image="busybox", labels=labels, secrets=secrets, env=env)


def test_variables_name_secrets_by_their_targets_which_rotations_keep() -> None:
    found = secret_variables(a_container("PASSWORD=db, KEY=api", "db", "api", "unused"))
    assert {name: one.secret_id for name, one in found.items()} == {
        "PASSWORD": "id of db",
        "KEY": "id of api",
    }
    assert secret_variables(a_container("", "db")) == {}
    assert secret_variables(None) == {}


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("PASSWORD", "expected VARIABLE=TARGET"),
        ("1A=db", "expected VARIABLE=TARGET"),
        ("A-B=db", "expected VARIABLE=TARGET"),
        ("A=db,A=api", "each variable once"),
        ("A=db,", "expected VARIABLE=TARGET"),
        ("A=other", "the service has no secret with the target other"),
        ("COLOUR=db", "COLOUR is already set by --env"),
        (",".join(f"A{number}=db" for number in range(VARIABLES_MAX + 1)), "at most 64 variables"),
    ],
)
def test_what_cannot_be_done_is_refused_when_the_service_is_created(label: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        check_secret_env(a_container(label, "db", "api", env=("COLOUR=red",)), {})


def test_the_label_of_a_service_is_refused_as_it_would_do_nothing() -> None:
    with pytest.raises(InvalidArgument, match="--container-label"):
        check_secret_env(a_container("", "db"), {SECRET_ENV_LABEL: "A=db"})


def test_who_uses_it_is_warned_with_the_variables_names() -> None:
    assert "(A, B)" in secret_env_warning(a_container("B=db,A=db", "db"))
    assert secret_env_warning(a_container("", "db")) == ""


@pytest.mark.parametrize("data", [b"\xff", b"a\0b", b"x" * (VALUE_BYTES_MAX + 1)])
def test_a_value_that_no_variable_can_have_is_refused_without_quoting_it(data: bytes) -> None:
    with pytest.raises(InvalidArgument) as refused:
        environment_entry("A", data)
    assert len(str(refused.value)) < 100


def test_a_value_is_taken_as_it_is() -> None:
    assert environment_entry("A", "pässword=1\n".encode()) == "A=pässword=1\n"
