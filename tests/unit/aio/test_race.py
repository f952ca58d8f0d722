"""Work that a cancellation does not cut off."""

import asyncio
import gc

import pytest

from skep.aio.race import run_to_end


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
