"""Roles, and what they reach."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.errors import InvalidArgument
from skep.model.permissions.access import EVERY_STACK, Binding, Identity, Origin, Role, parse_binding, weaker


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
    with pytest.raises(InvalidArgument, match="cannot be limited to a stack"):
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


BINDINGS = st.builds(
    Binding, st.sampled_from(Role), st.sampled_from([EVERY_STACK, "shop", "payments"])
).filter(lambda one: one.role is not Role.ADMIN or one.stack == EVERY_STACK)


@given(st.lists(BINDINGS, max_size=3), BINDINGS)
def test_a_limited_identity_has_what_both_have_and_nothing_else(
    given_: list[Binding], limit: Binding
) -> None:
    identity = Identity(name="ann", origin=Origin.TOKEN, bindings=tuple(given_))
    other = Identity(name="limit", origin=Origin.TOKEN, bindings=(limit,))
    limited = identity.limited_to(limit)
    for stack in ("shop", "payments", "third"):
        roles = (identity.role_in(stack), other.role_in(stack))
        both = min(filter(None, roles)) if None not in roles else None
        # In one stack there is no administrator: an operator is the most.
        expected = Role.OPERATOR if both is Role.ADMIN and not limited.is_admin else both
        assert limited.role_in(stack) == expected
    assert limited.is_admin == (identity.is_admin and other.is_admin)
    assert not (limited.role_in(EVERY_STACK) or 0) > min(
        identity.role_in(EVERY_STACK) or 0, other.role_in(EVERY_STACK) or 0
    )


@given(BINDINGS, BINDINGS)
def test_the_weaker_of_two_writers_counts(one: Binding, other: Binding) -> None:
    found = weaker(one, other)
    assert found == weaker(other, one) or found.stack != EVERY_STACK
    assert found.role == min(one.role, other.role)
