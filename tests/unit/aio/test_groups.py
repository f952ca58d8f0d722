"""What leaves a task group: an error that people can read, and not a group of groups."""

import asyncio

import pytest

from skep.aio.groups import errors_as_they_are, first_alone
from skep.errors import NotFound, SkepError, Unavailable


async def fail(*errors: Exception) -> None:
    """Raise a single error, or several as a group does whose tasks fail together."""
    if len(errors) == 1:
        raise errors[0]
    async with asyncio.TaskGroup() as group:
        for error in errors:
            group.create_task(fail(error))


async def in_a_group(*errors: Exception) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(fail(*errors))


async def test_a_single_error_leaves_as_itself_with_its_own_cause() -> None:
    cause, error = OSError("why"), NotFound("gone")
    error.__cause__ = cause
    with pytest.raises(NotFound) as caught:
        async with errors_as_they_are():
            await in_a_group(error)
    assert (caught.value, caught.value.__cause__) == (error, cause)


async def test_several_errors_stay_a_group() -> None:
    with pytest.raises(ExceptionGroup):
        async with errors_as_they_are():
            await fail(NotFound("one"), NotFound("other"))


async def test_of_errors_of_one_kind_the_first_leaves_alone() -> None:
    with pytest.raises(NotFound, match="one") as caught, first_alone(SkepError):
        await in_a_group(NotFound("one"), Unavailable("other"))
    assert isinstance(caught.value.__cause__, ExceptionGroup)


async def test_a_group_with_an_error_of_another_kind_stays_whole() -> None:
    with pytest.raises(ExceptionGroup) as caught, first_alone(SkepError):
        await fail(NotFound("expected"), ZeroDivisionError("a mistake"))
    assert [type(error) for error in caught.value.exceptions] == [NotFound, ZeroDivisionError]


async def test_what_is_no_group_passes() -> None:
    with pytest.raises(ZeroDivisionError), first_alone(SkepError):
        await fail(ZeroDivisionError())
