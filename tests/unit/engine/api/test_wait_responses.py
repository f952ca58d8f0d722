"""What ``POST /containers/{id}/wait`` responds about a container that could not be started."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.api.http.server import application
from skep.engine.api.containers import container_routes
from skep.engine.containers.container import WaitCondition
from tests.unit.engine.test_specification import a_container

REASON = "exec: nosuch: executable file not found in $PATH"


class FailedStart:
    """An engine whose container could not be started."""

    def __init__(self) -> None:
        self.execs = SimpleNamespace()
        self._container = replace(a_container(), exit_code=127, error=REASON)

    def get(self, word: str) -> Any:
        return self._container

    async def wait(self, word: str, condition: WaitCondition) -> Any:
        return self._container


@pytest.mark.parametrize(
    ("condition", "error"),
    [("next-exit", {"Message": REASON}), ("not-running", {"Message": REASON}), ("removed", None)],
)
async def test_who_waits_for_the_removal_is_not_given_the_reason_of_the_start_again(
    tmp_path: Path, condition: str, error: dict[str, str] | None
) -> None:
    """``docker run --rm`` has shown it already (moby, container/state.go, SetRemovalError)."""
    runner = web.AppRunner(application(container_routes(cast("Any", FailedStart()))))
    await runner.setup()
    try:
        await web.UnixSite(runner, str(tmp_path / "api")).start()
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "api"))) as session,
            session.post(f"http://d/v1.41/containers/c1/wait?condition={condition}") as response,
        ):
            found = await response.json(content_type=None)
    finally:
        await runner.cleanup()
    assert (found["StatusCode"], found.get("Error")) == (127, error)
