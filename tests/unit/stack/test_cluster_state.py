"""A plan is checked by managers of any version, and by a registry that may not respond."""

from typing import Any

import pytest

from skep.api.client.client import ApiClient
from skep.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, SkepError, Unavailable
from skep.stack.cluster_state import check, kept_images, pinned_images
from skep.stack.planning import Existing, plan_of
from tests.support.builders import a_service, a_service_spec
from tests.unit.stack.test_revisions import a_stack

_UNKNOWN = PermissionDenied("ann may not POST /skep/stacks/check: only administrators may do this")
_MACHINE = PermissionDenied(
    "ann may not POST /skep/stacks/check: Privileged: only administrators may give that"
)
_MANY = InvalidArgument("too much at once: at most 2000 objects")
_BUSY = ResourceExhausted("too many checks")


class Refusing(ApiClient):
    """Refuses every request."""

    def __init__(self, error: SkepError) -> None:
        super().__init__("http://nowhere")
        self._error = error

    async def request(self, method: str, path: str, **_: Any) -> Any:
        raise self._error


async def warnings_of(error: SkepError) -> list[str]:
    stack, warnings = a_stack(), list[str]()
    await check(Refusing(error), stack, plan_of(stack, Existing(), images={}, prune=False), warnings.append)
    return warnings


@pytest.mark.parametrize("error", [NotFound("page not found"), _UNKNOWN])
async def test_managers_of_an_earlier_version_do_not_check_and_that_is_no_error(error: SkepError) -> None:
    assert await warnings_of(error) == []


@pytest.mark.parametrize("error", [_MANY, _BUSY])
async def test_a_plan_that_is_too_large_to_be_checked_is_deployed_with_a_warning(error: SkepError) -> None:
    assert await warnings_of(error) == [f"the managers did not check the plan: {error}"]


@pytest.mark.parametrize("error", [_MACHINE, InvalidArgument("invalid spec")])
async def test_other_refusals_of_a_plan_end_the_deploy(error: SkepError) -> None:
    with pytest.raises(type(error)):
        await warnings_of(error)


@pytest.mark.parametrize(
    ("runs", "wanted", "warns"),
    [
        (None, "app:1", True),
        ("app:1", "app:1", False),
        (f"app:1@sha256:{'0' * 64}", "app:1", True),
        ("app:1", "app:2", True),
        ("app:10", "app:1", True),
    ],
)
async def test_a_registry_that_does_not_respond_is_named_for_images_that_it_may_have(
    runs: str | None, wanted: str, warns: bool
) -> None:
    existing = [a_service("shop_web", image=runs)] if runs is not None else []
    kept = kept_images([a_service_spec("shop_web", image=wanted)], existing)
    warnings: list[str] = []
    client = Refusing(Unavailable("connection refused"))
    assert await pinned_images(client, [wanted], warnings.append, kept=kept) == {}
    assert bool(warnings) is warns


def test_an_image_matters_if_one_of_its_services_is_new() -> None:
    wanted = [a_service_spec(name, image="app:1") for name in ("shop_web", "shop_api")]
    assert kept_images(wanted, [a_service("shop_web", image="app:1")]) == set()


async def test_a_user_without_the_right_to_ask_a_registry_gets_the_refusal_of_the_deploy_alone() -> None:
    warnings: list[str] = []
    client = Refusing(PermissionDenied("vv may not GET /distribution/app:1/json"))
    assert await pinned_images(client, ["app:1"], warnings.append, kept=set()) == {}
    assert warnings == []
