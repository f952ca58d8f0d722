"""A manager's API for commands."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from skep.api.client.client import ApiClient
from skep.manager.routes import ManagerApi
from skep.manager.routes import application as manager_application
from tests.conformance.manager import a_manager_api


class Host:
    """In the place of the command's options."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def client(self) -> ApiClient:
        return ApiClient.local(self.socket, "the manager")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[tuple[ManagerApi, Any]]:
    """A manager, and the options of a command that reaches it."""
    async with a_manager_api() as manager:
        runner = web.AppRunner(manager_application(manager))
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "m.sock")).start()
        yield manager, cast("Any", Host(tmp_path / "m.sock"))
        await runner.cleanup()
