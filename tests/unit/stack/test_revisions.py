"""The revisions of a stack."""

import asyncio
import random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.values.times import SECOND_NS, unix_ns
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import parse
from skep.stack.compose.reading import ProblemReport
from skep.stack.planning import Existing, StackPlan, plan_of
from skep.stack.project import Stack
from skep.stack.revisions import (
    KEPT,
    KEPT_BYTES,
    UNFINISHED_MAX_S,
    StackRevision,
    before,
    body_of,
    by_number,
    kept_of,
    names_of,
    newest_deployed,
    pair_of,
    revisions_of,
    state_after,
    unfinished_of,
)

TEXT = """
services: {w: {image: w, configs: [c], secrets: [s]}}
configs: {c: {content: hidden-%s}}
secrets: {s: {file: f}}
"""

EMPTY = StackPlan(stack="shop", changes=())


def a_stack(content: str = "1") -> Stack:
    return stack_of(parse(TEXT % content, "f"), "shop", {("secrets", "s"): b"hidden"}, ProblemReport())


def body(number: int = 1, content: str = "1", **images: str) -> dict[str, Any]:
    stack = a_stack(content)
    return body_of(stack, plan_of(stack, Existing(), images=images, prune=False), number)


def config(made: dict[str, Any], **labels: str) -> dict[str, Any]:
    """As ``GET /configs`` has it."""
    spec = made | {"Labels": made["Labels"] | labels}
    return {"ID": made["Name"], "Version": {"Index": 5}, "CreatedAt": "2026-01-01T00:00:00Z", "Spec": spec}


def revisions(*configs: dict[str, Any]) -> list[StackRevision]:
    return revisions_of("shop", configs)


def test_a_revision_has_specs_with_digests_and_no_content() -> None:
    made = body(3, w="w@sha256:1")
    (one,) = revisions(config(made))
    assert (one.number, one.state, one.changes) == (3, "deploying", "4 created")
    stack = one.stack()
    container = stack.services["w"].spec.task_template.container_spec
    assert container is not None
    assert container.image == "w@sha256:1"
    assert [(file.name, file.content, file.is_external) for file in stack.configs.values()] == [
        (a_stack().configs["c"].name, None, True)
    ]
    assert b"hidden" not in repr(stack).encode()


def test_revisions_are_those_of_the_stack_in_the_order_of_their_numbers() -> None:
    label = "com.docker.stack.namespace"
    found = revisions(
        config(body(10)),
        config(body(9)),
        config(body(1), **{label: "other"}),
        config(body(2), **{"skep.stack.revision": "x"}),
        {"ID": "c", "Version": {"Index": 1}, "CreatedAt": "", "Spec": {"Name": "c", "Labels": None}},
    )
    assert [one.number for one in found] == [9, 10]


def test_the_one_to_return_to_is_the_last_that_was_deployed_before() -> None:
    state = "skep.stack.state"
    found = revisions(
        config(body(1), **{state: "deployed"}),
        config(body(2), **{state: "failed: x"}),
        config(body(3), **{state: "deployed"}),
    )
    assert before("shop", found, None).number == 1
    assert before("shop", found, 2).number == 2
    assert before("shop", found[:2], None).number == 1
    assert newest_deployed("shop", found).number == 3
    with pytest.raises(InvalidArgument, match=r"^there is no revision 7\. Choose one of 1, 2, 3\.$"):
        before("shop", found, 7)
    with pytest.raises(
        InvalidArgument, match=r"^no earlier revision of shop was deployed\. Run skep stack history shop\.$"
    ):
        before("shop", found[:1], None)
    with pytest.raises(
        InvalidArgument, match=r"deployed\. skep stack rollback --to 2 shop deploys a failed revision"
    ):
        before("shop", found[1:], None)


def test_the_revisions_to_compare_are_the_last_two_or_those_that_are_named() -> None:
    found = revisions(*(config(body(number)) for number in (1, 2, 3)))

    def numbers(first: int | None, second: int | None) -> tuple[int, int]:
        older, newer = pair_of("shop", by_number(found), first, second, kind="stack")
        return older.number, newer.number

    assert (numbers(None, None), numbers(1, None), numbers(3, 1)) == ((2, 3), (1, 3), (3, 1))
    with pytest.raises(InvalidArgument, match="only revision 1"):
        pair_of("shop", by_number(found[:1]), None, None, kind="stack")
    with pytest.raises(InvalidArgument, match=r"no revision\. Run skep service history shop\.$"):
        pair_of("shop", {}, None, None, kind="service")
    with pytest.raises(InvalidArgument, match="no revision 9"):
        pair_of("shop", by_number(found), 9, None, kind="stack")


def test_kept_revisions_keep_their_secrets_and_configs() -> None:
    found = revisions(*(config(body(number, str(number))) for number in range(1, KEPT + 3)))
    kept = names_of(kept_of(found))
    assert a_stack("1").configs["c"].name not in kept
    assert a_stack("3").configs["c"].name in kept
    assert a_stack("3").secrets["s"].name in kept


@pytest.mark.parametrize("data", ["", "!", "aGVsbG8=", body()["Data"][:-40]])
def test_a_damaged_revision_is_refused_and_hurts_no_other(data: str) -> None:
    found = revisions(config(body(1) | {"Data": data}), config(body(2)))
    with pytest.raises(InvalidArgument, match="revision 1 cannot be read"):
        found[0].stack()
    assert names_of(found)


def test_a_stack_that_is_too_large_is_refused() -> None:
    stack = a_stack()
    text = random.Random(1).randbytes(2_000_000).hex()
    plan = plan_of(stack, Existing(), images={"w": text}, prune=False)
    with pytest.raises(InvalidArgument, match="too large for a revision"):
        body_of(stack, plan, 1)


def test_the_state_of_a_deploy_that_failed_has_its_cause() -> None:
    assert state_after(None) == "deployed"
    assert state_after(InvalidArgument("no\nnode")) == "failed: no node"
    assert state_after(asyncio.CancelledError()) == state_after(KeyboardInterrupt()) == "interrupted"
    assert len(state_after(InvalidArgument("x" * 1000))) < 400


def test_a_deploy_that_ended_long_ago_is_not_taken_over() -> None:
    """Its services may be in use, so that no undo may remove them."""
    found = revisions(config(body(1), **{"skep.stack.state": "interrupted"}))
    created_ns = unix_ns(found[0].created_at)
    assert unfinished_of(found, created_ns + UNFINISHED_MAX_S * SECOND_NS) == found
    assert unfinished_of(found, created_ns + (UNFINISHED_MAX_S + 1) * SECOND_NS) == []


def test_stacks_with_long_names_have_revisions_of_their_own() -> None:
    names = {body_of(replace(a_stack(), name="s" * 60 + end), EMPTY, 1)["Name"] for end in "ab"}
    assert len(names) == 2
    assert all(len(name) <= 64 for name in names)


def test_large_revisions_are_fewer_and_the_one_to_return_to_is_kept() -> None:
    """Every manager has all configs in memory."""

    def found(size: int, *states: str) -> list[StackRevision]:
        return [
            StackRevision(
                number=number,
                id=str(number),
                version=1,
                created_at="",
                labels={"skep.stack.state": state},
                data="x" * size,
                of="shop",
            )
            for number, state in enumerate(states, 1)
        ]

    def numbers(revisions: list[StackRevision]) -> list[int]:
        return [one.number for one in kept_of(revisions)]

    assert numbers(found(1000, *["deployed"] * 12)) == list(range(3, 13))
    assert numbers(found(KEPT_BYTES // 4, *["deployed"] * 12)) == [9, 10, 11, 12]
    assert numbers(found(KEPT_BYTES * 2, *["deployed"] * 12)) == [11, 12]
    assert numbers(found(1000, "deployed", *["failed: x"] * 12)) == [1, *range(4, 14)]
    assert numbers(found(1000)) == []
