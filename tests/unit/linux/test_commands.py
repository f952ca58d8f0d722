import asyncio

import pytest

from skep.linux.commands import communicate


async def shell(line: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *("sh", "-c", line),
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
