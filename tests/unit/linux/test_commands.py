import asyncio
from pathlib import Path

import pytest

from skep.linux.commands import communicate


async def shell(line: str, *, leads_session: bool = False) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *("sh", "-c", line),
        start_new_session=leads_session,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_both_outputs_are_given():
    assert await communicate(await shell("cat; echo no >&2"), 10, b"yes") == (b"yes", b"no\n")


async def test_a_command_that_takes_too_long_is_gone_afterwards():
    process = await shell("exec sleep 100")
    with pytest.raises(TimeoutError):
        await communicate(process, 0.05)
    assert process.returncode == -9


async def test_a_command_does_not_outlive_its_cancelled_caller():
    process = await shell("exec sleep 100")
    asking = asyncio.get_running_loop().create_task(communicate(process, 10))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert process.returncode == -9


@pytest.mark.parametrize("how", ["cancelled", "late", "background"])
async def test_the_children_of_a_session_end_with_it(how: str, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    child = f"(sleep 0.4; touch {moved})"
    line = f"{child} >/dev/null 2>&1 & sleep 0.2" if how == "background" else f"{child}; exit 0"
    process = await shell(line, leads_session=True)
    deadline_s = 0.2 if how == "late" else 10
    asking = asyncio.create_task(communicate(process, deadline_s, leads_session=True))
    await asyncio.sleep(0.1)
    if how == "cancelled":
        asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.sleep(0.5)
    assert not moved.exists()


async def test_a_child_that_left_the_session_does_not_delay_its_end() -> None:
    process = await shell("setsid sleep 5 & exec sleep 5", leads_session=True)
    asking = communicate(process, 0.1, leads_session=True)
    async with asyncio.timeout(2):
        with pytest.raises(TimeoutError):
            await asking
    assert process.returncode == -9
