"""Roles, and what they reach."""

import pytest

from skep.errors import InvalidArgument
from skep.model.access import EVERY_STACK, Binding, Identity, Origin, Role, parse_binding


def a_user(*bindings: str) -> Identity:
    return Identity(name="ann", origin=Origin.TOKEN, bindings=tuple(map(parse_binding, bindings)))


@pytest.mark.parametrize("text", ["viewer", "operator", "admin", "operator:shop", "viewer:a_b.c-1"])
def test_a_binding_is_read_as_it_is_written(text: str) -> None:
    assert str(parse_binding(text)) == text


def test_the_star_is_the_whole_cluster() -> None:
    assert parse_binding("viewer:*") == Binding(Role.VIEWER, EVERY_STACK)


@pytest.mark.parametrize(
    "text", ["", "root", "operator:", "operator:a/b", "viewer:../x", "viewer:" + "x" * 129]
)
def test_what_is_no_binding_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_binding(text)


def test_there_is_no_admin_of_a_single_stack() -> None:
    with pytest.raises(InvalidArgument, match="whole cluster"):
        parse_binding("admin:shop")


def test_the_highest_role_that_reaches_a_stack_counts() -> None:
    ann = a_user("viewer", "operator:shop")
    assert ann.role_in("shop") is Role.OPERATOR
    assert ann.role_in("other") is Role.VIEWER
    assert ann.role_in(EVERY_STACK) is Role.VIEWER


def test_a_role_in_a_stack_reaches_nothing_else() -> None:
    bob = a_user("operator:shop")
    assert bob.role_in("other") is None
    assert bob.role_in(EVERY_STACK) is None
    assert not bob.is_admin
