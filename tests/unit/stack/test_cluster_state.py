"""A plan is checked by managers of any version."""

from typing import Any

import pytest

from skep.api.client import Client
from skep.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, SkepError
from skep.stack.cluster_state import check
from skep.stack.planning import Existing, plan_of
from tests.unit.stack.test_revisions import a_stack

_UNKNOWN = PermissionDenied("ann may not POST /skep/stacks/check: only administrators may do this")
_MACHINE = PermissionDenied(
    "ann may not POST /skep/stacks/check: Privileged: only administrators may give that"
)
_MANY = InvalidArgument("too much at once: at most 2000 objects")
_BUSY = ResourceExhausted("too many checks")


class Refusing(Client):
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
