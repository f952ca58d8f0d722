"""Whose image a name means, and one list of two stores."""

from typing import Any

import pytest

from skep.node.docker.engine_images import merged, theirs_is_newer

A, B, C = "sha256:a", "sha256:b", "sha256:c"
UNTAGGED = {"RepoTags": ["<none>:<none>"], "RepoDigests": ["<none>@<none>"]}


@pytest.mark.parametrize(
    ("ours", "theirs", "seen", "expected"),
    [
        pytest.param("", A, {}, True, id="only the engine has it"),
        pytest.param(A, "", {}, False, id="only this node has it"),
        pytest.param(A, A, {}, False, id="both have the same"),
        pytest.param(A, B, {"app:1": B}, False, id="the engine's is as it was, so this node's has changed"),
        pytest.param(A, C, {"app:1": B}, True, id="the engine's has changed"),
        pytest.param(A, B, {}, True, id="the engine's is new"),
    ],
)
def test_the_image_that_changed_last_counts(
    ours: str, theirs: str, seen: dict[str, str], expected: bool
) -> None:
    assert theirs_is_newer("app:1", ours, theirs, seen) is expected


def an_entry(id: str, *tags: str, created: int = 0, digests: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"Id": id, "RepoTags": list(tags), "RepoDigests": list(digests), "Created": created}


def shown(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {one["Id"]: one["RepoTags"] for one in merged(ours, theirs, UNTAGGED)}


def test_an_image_that_both_have_is_one_entry_with_all_its_names() -> None:
    ours, theirs = [an_entry(A, "app:1", digests=("app@x",))], [an_entry(A, "app:1", "app:2")]
    (one,) = merged(ours, theirs, UNTAGGED)
    assert (one["RepoTags"], one["RepoDigests"]) == (["app:1", "app:2"], ["app@x"])


def test_a_name_is_shown_once_and_an_image_without_one_is_dangling() -> None:
    assert shown([an_entry(A, "app:1")], [an_entry(B, "app:1"), an_entry(C, "<none>:<none>")]) == {
        A: ["app:1"],
        B: ["<none>:<none>"],
        C: ["<none>:<none>"],
    }


def test_the_newest_is_first() -> None:
    entries = merged([an_entry(A, "a:1", created=1)], [an_entry(B, "b:1", created=2)], UNTAGGED)
    assert [one["Id"] for one in entries] == [B, A]


def test_lists_of_engines_that_leave_out_names_are_read() -> None:
    assert shown([{"Id": A, "RepoTags": None, "RepoDigests": None}], [{"Id": B}]) == {
        A: ["<none>:<none>"],
        B: ["<none>:<none>"],
    }
