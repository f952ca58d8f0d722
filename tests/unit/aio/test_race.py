"""Work that a cancellation does not cut off."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import pytest

from skep.aio.race import afterwards, run_to_end, thread_to_end, unless_done


@pytest.mark.parametrize("times", [1, 3])
async def test_however_often_the_caller_is_cancelled_it_returns_once_the_work_has_ended(times: int) -> None:
    go_on, is_over = asyncio.Event(), False

    async def work() -> None:
        nonlocal is_over
        await go_on.wait()
        is_over = True

    caller = asyncio.create_task(run_to_end(work()))
    for _ in range(times):
        await asyncio.wait([caller], timeout=0)
        caller.cancel()
    await asyncio.wait([caller], timeout=0)
    assert not caller.done()
    go_on.set()
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert is_over


def test_nothing_is_logged_at_the_end_of_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(run_to_end(asyncio.Event().wait()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            asyncio.get_running_loop().stop()
            await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="stopped before"):
        asyncio.run(main())
    gc.collect()
    assert not caplog.records


async def test_a_deadline_of_the_caller_is_met_once_the_work_has_ended() -> None:
    is_over = False

    async def work() -> None:
        nonlocal is_over
        await asyncio.sleep(0.05)
        is_over = True

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.03), asyncio.timeout(0.01):
            await run_to_end(work())
    assert is_over


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("cleaning", [afterwards, unless_done])
async def test_a_cleanup_continues_if_its_caller_is_cancelled_once_more(
    cleaning: Callable[[Callable[[], Awaitable[object]]], AbstractAsyncContextManager[None]], *, fails: bool
) -> None:
    go_on, is_over = asyncio.Event(), asyncio.Event()

    async def clean() -> None:
        await go_on.wait()
        is_over.set()

    async def work() -> None:
        async with cleaning(clean):
            if fails:
                raise OSError
            await asyncio.Event().wait()

    caller = asyncio.create_task(work())
    for _ in range(2):
        await asyncio.wait([caller], timeout=0.01)
        caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    go_on.set()
    await asyncio.wait_for(is_over.wait(), 5)


async def test_only_a_block_that_is_not_completed_is_undone() -> None:
    done: list[str] = []

    async def note(text: str) -> None:
        done.append(text)

    async with unless_done(partial(note, "undone")), afterwards(partial(note, "cleaned")):
        pass
    assert done == ["cleaned"]


async def test_a_thread_has_ended_when_its_cancelled_caller_returns() -> None:
    stopped, ended = threading.Event(), threading.Event()

    def act() -> None:
        stopped.wait(10)
        ended.set()

    caller = asyncio.create_task(thread_to_end(act, stopped.set))
    await asyncio.wait([caller], timeout=0.01)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert ended.is_set()


async def test_a_thread_returns_its_result_or_raises_its_error() -> None:
    assert await thread_to_end(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await thread_to_end(lambda: 1 // 0)
