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


async def test_without_a_leader_an_explanation_waits_for_nothing_that_only_a_leader_answers() -> None:
    asked: list[str] = []
    found = {
        "ServiceID": "s1",
        "Summary": "0 of 1 tasks run",
        "Reasons": [],
        "Failures": [],
        "Running": 0,
        "Desired": 1,
    }

    async def quorum(_: web.Request) -> web.Response:
        managers = [{"Hostname": f"m{number}", "IsReachable": number == 1} for number in (1, 2, 3)]
        return web.json_response({"HasLeader": False, "Since": "2026-11-21T18:38:04Z", "Managers": managers})

    async def service(request: web.Request) -> web.Response:
        if request.match_info["name"] != "web":
            raise web.HTTPNotFound(text='{"message": "service not found"}')
        return web.json_response(found)

    async def of_the_leader(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"message": "no leader"}, status=503)

    async def absent(request: web.Request) -> web.Response:
        return web.json_response({"message": f"{request.path} not found"}, status=404)

    app = web.Application()
    for prefix in ("", "/v{version:[0-9.]+}"):
        app.router.add_get(f"{prefix}/skep/quorum", quorum)
        app.router.add_get(f"{prefix}/skep/services/{{name}}/explain", service)
        for path in ("door", "verify", "catalog", "history"):
            app.router.add_get(f"{prefix}/skep/{path}", of_the_leader)
    app.router.add_get("/{path:.*}", absent)
    for name, said in (
        ("web", "web: 0 of 1 tasks run"),
        ("wbe", "no such service, task, node or network: wbe"),
    ):
        async with TestServer(app) as server:
            arguments = ["--host", f"tcp://127.0.0.1:{server.port}", "explain", name]
            result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
        assert said in result.output
    assert asked == []
