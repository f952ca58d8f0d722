"""Names of removed objects, from the commands themselves."""

import asyncio

from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner

from skep.cli.main import main


def an_api() -> web.Application:
    """A manager whose only service was removed, so that only its history has the name."""

    lost = {"Kind": "change", "Type": "journal", "Action": "lost-entries"}
    removed = {"Kind": "change", "Type": "service", "Action": "remove", "Name": "web"}

    async def history(request: web.Request) -> web.Response:
        assert request.query["kind"] == "change", "a refused request creates nothing"
        entries = [lost, *([removed] if request.query["about"] == "web" else [])]
        return web.json_response({"Entries": entries, "Total": 5})

    async def absent(request: web.Request) -> web.Response:
        return web.json_response({"message": f"{request.path} not found"}, status=404)

    app = web.Application()
    for prefix in ("", "/v{version:[0-9.]+}"):
        app.router.add_get(f"{prefix}/skep/history", history)
    app.router.add_get("/{path:.*}", absent)
    return app


async def test_an_explanation_of_a_removed_service_leads_to_its_history() -> None:
    for name, further in (
        ("web", "web was removed. Run skep history web to see when and by whom."),
        ("wbe", "no such service, task, node or network: wbe. Run skep status to list services and nodes."),
    ):
        async with TestServer(an_api()) as server:
            arguments = ["--host", f"tcp://127.0.0.1:{server.port}", "explain", name]
            result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
        assert result.exit_code == 1
        assert further in result.output
