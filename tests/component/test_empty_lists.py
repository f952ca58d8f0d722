"""Empty lists of a user of some stacks, from the commands themselves."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner

from skep.cli.main import main


def an_api(*roles: str) -> web.Application:
    """A manager without objects that the user sees."""
    answers = {"/skep/access": {"Roles": list(roles)}, "/skep/catalog": {"Catalog": {}}}

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(answers.get(request.path, []))

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    return app


@pytest.mark.parametrize(
    ("command", "none", "absent"),
    [
        (("job", "ls"), "No jobs of your stacks", "No jobs. Create one with"),
        (("stack", "ls"), "None of your stacks exists", "No stacks. Deploy one with"),
        (("catalog", "ls"), "No services of your stacks", "No service is reached anywhere."),
    ],
)
async def test_an_empty_list_of_a_user_of_a_stack_is_not_called_an_absence(
    command: tuple[str, str], none: str, absent: str
) -> None:
    for role, words in (
        ("viewer:shop", f"{none}, and you do not see others."),
        ("viewer", absent),
    ):
        async with TestServer(an_api(role)) as server:
            arguments = ["--host", f"tcp://127.0.0.1:{server.port}", *command]
            result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
        assert result.exit_code == 0, result.output
        assert words in result.output
