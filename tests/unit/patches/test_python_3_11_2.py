"""What is mended of asyncio, on a Python that needs it and on others."""

import asyncio
import subprocess
import sys
from asyncio import sslproto
from typing import Any

import pytest

from skep.patches import python_3_11_2

TRANSPORT: Any = sslproto._SSLProtocolTransport


@pytest.fixture(params=["as it is", "mended"])
def mended(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (asyncio.Timeout, "__aenter__"),
        (asyncio.Timeout, "__aexit__"),
        (TRANSPORT, "abort"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    if request.param == "mended":
        python_3_11_2.install()


@pytest.mark.usefixtures("mended")
async def test_a_deadline_in_a_cleanup_is_a_time_out() -> None:
    seen = []

    async def cleans_up() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                async with asyncio.timeout(0.001):
                    await asyncio.Event().wait()
            except BaseException as error:
                seen.append(type(error))

    cleaning = asyncio.create_task(cleans_up())
    await asyncio.sleep(0)
    cleaning.cancel()
    await asyncio.wait([cleaning])
    assert seen == [TimeoutError]
    assert cleaning.cancelled()


@pytest.mark.usefixtures("mended")
async def test_a_cancellation_at_the_deadline_stays_one() -> None:
    async def waits() -> None:
        async with asyncio.timeout(0.001):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                waiting.cancel()
                raise

    waiting = asyncio.create_task(waits())
    await asyncio.wait([waiting])
    assert waiting.cancelled()


@pytest.mark.usefixtures("mended")
async def test_deadlines_within_each_other_are_told_apart() -> None:
    async with asyncio.timeout(10) as outer:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
    assert not outer.expired()


@pytest.mark.usefixtures("mended")
async def test_a_closed_connection_can_be_aborted() -> None:
    loop = asyncio.get_running_loop()
    connection = TRANSPORT(loop, None)
    connection._closed = True
    connection.abort()


def test_where_it_is_needed_it_is_there() -> None:
    says = "import skep.aio, asyncio; print(asyncio.Timeout.__aexit__.__module__)"
    done = subprocess.run(
        [sys.executable, "-c", says], capture_output=True, text=True, check=True, timeout=60
    )
    expected = "skep.patches.python_3_11_2" if sys.version_info < (3, 11, 7) else "asyncio.timeouts"
    assert done.stdout.strip() == expected
