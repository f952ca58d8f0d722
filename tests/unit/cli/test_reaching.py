"""What the commands that reach into containers make of their words."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from skep.api.client.raw import RawClient
from skep.cli.apps.port_forward import Forward, parse_forward
from skep.cli.apps.run import run_spec
from skep.cli.apps.targets import CommandTarget
from skep.cli.apps.through_docker import _of_copy, _socket, arguments_of, lost_connections, rewritten
from skep.errors import FailedPrecondition, InvalidArgument


@pytest.mark.parametrize(
    ("word", "forward"),
    [
        ("80", Forward("127.0.0.1", 80, 80)),
        ("8080:80", Forward("127.0.0.1", 8080, 80)),
        (":80", Forward("127.0.0.1", 0, 80)),
        ("0.0.0.0:8080:80", Forward("0.0.0.0", 8080, 80)),
        ("[::1]:8080:80", Forward("::1", 8080, 80)),
    ],
)
def test_a_port_to_forward(word, forward):
    assert parse_forward(word) == forward


@pytest.mark.parametrize(
    "word", ["", "0", "65536", "http", "80:", "x:80", "99999:80", "-1", "8080:http", "8²"]
)
def test_what_is_no_port_is_refused(word):
    with pytest.raises(InvalidArgument, match="Use "):
        parse_forward(word)


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/v1.47/containers/web.1/stats?stream=1", "/v1.47/skep/tasks/t1/container/stats?stream=1"),
        ("/containers/web.1/archive?path=%2Fetc", "/skep/tasks/t1/container/archive?path=%2Fetc"),
        ("/v1.47/containers/we%62.1/json", "/v1.47/skep/tasks/t1/container/json"),
        ("/v1.47/containers/other/json", "/v1.47/containers/other/json"),
        ("/_ping", "/_ping"),
        ("/v1.47/containers/json", "/v1.47/containers/json"),
        ("/v1.47/containers/web.1/../../swarm", "/v1.47/containers/web.1/../../swarm"),
    ],
)
def test_what_docker_asks_about_a_task_goes_to_its_managers(target, sent):
    assert rewritten(target, {"web.1": CommandTarget(task_id="t1", node_id="n1", name="web.1")}) == sent


def test_the_words_that_may_mean_tasks_are_found_among_options():
    assert arguments_of(["--format", "json", "--no-stream", "web.1", "db"], "--format") == ["web.1", "db"]
    assert arguments_of(["--", "-odd"], "--format") == ["-odd"]
    assert _of_copy(["-a", "web.1:/etc/hosts", "./here:there"]) == ["web.1"]
    assert _of_copy(["/a:b", "db:/x"]) == ["db"]


def test_a_run_is_a_job_like_a_task_of_its_service():
    service = {
        "Name": "web",
        "Labels": {"team": "red"},
        "EndpointSpec": {"Ports": [{"TargetPort": 80, "PublishedPort": 80}]},
        "Mode": {"Replicated": {"Replicas": 3}},
        "TaskTemplate": {
            "ContainerSpec": {
                "Image": "app",
                "Command": ["/start"],
                "Args": ["serve"],
                "Env": ["A=b"],
                "Secrets": [1],
                "Configs": [2],
                "Mounts": [3],
                "Healthcheck": {"Test": ["CMD", "ask"]},
            },
            "RestartPolicy": {"Condition": "any"},
            "Networks": [{"Target": "n1"}],
            "ForceUpdate": 4,
        },
    }
    made = run_spec(service, ["migrate", "--now"], name="web-run-1", env=["C=d"])
    container = made["TaskTemplate"]["ContainerSpec"]
    assert (container["Image"], container["Command"], container["Args"]) == (
        "app",
        ["/start"],
        ["migrate", "--now"],
    )
    assert container["Env"] == ["A=b", "C=d"]
    assert (container["Secrets"], container["Configs"], container["Mounts"]) == ([1], [2], [3])
    assert container["Healthcheck"] == {"Test": ["NONE"]}, (
        "a service's would end a command that serves nothing"
    )
    assert (container["TTY"], container["OpenStdin"]) == (False, False)
    interactive = run_spec(service, [], name="web-run-2", tty=True)["TaskTemplate"]["ContainerSpec"]
    assert (interactive["TTY"], interactive["OpenStdin"], interactive["Args"]) == (True, True, [])
    assert made["TaskTemplate"]["Networks"] == [{"Target": "n1"}]
    assert made["TaskTemplate"]["RestartPolicy"] == {"Condition": "none"}
    assert made["Mode"] == {"ReplicatedJob": {"MaxConcurrent": 1, "TotalCompletions": 1}}
    assert "EndpointSpec" not in made
    assert service["TaskTemplate"]["ContainerSpec"]["Args"] == ["serve"]


def test_a_service_without_containers_runs_nothing():
    with pytest.raises(FailedPrecondition, match="runs no containers"):
        run_spec({"Name": "plug", "TaskTemplate": {"PluginSpec": {}}}, [], name="x")


class _Silent:
    """A host whose connection never ends."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            self.begun.set()
            yield reader, writer
            writer.close()


async def test_no_connection_of_docker_outlives_its_socket() -> None:
    host: Any = _Silent()
    before = asyncio.all_tasks()
    async with _socket(host, {}) as path:
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /_ping HTTP/1.1\r\n\r\n")
        await host.begun.wait()
    assert asyncio.all_tasks() == before
    writer.close()


async def test_a_command_that_fails_names_the_node_that_is_down_and_repeats_no_error_of_docker(
    tmp_path: Path,
) -> None:
    answers = {
        "lost": (503, "task lost runs on node w2, which is down"),
        "ended": (409, "task ended is not running"),
        "runs": (200, ""),
    }

    async def respond(request: web.Request) -> web.Response:
        status, message = answers[request.match_info["id"]]
        return web.json_response({"message": message}, status=status)

    app = web.Application()
    app.router.add_get("/skep/tasks/{id}/container/json", respond)
    served = web.AppRunner(app)
    await served.setup()
    await web.UnixSite(served, str(tmp_path / "api.sock")).start()
    tasks = [CommandTarget(task_id=id, node_id="n", name=id) for id in answers]
    async with RawClient(f"unix://{tmp_path / 'api.sock'}") as client:
        assert await lost_connections(client, tasks) == ["task lost runs on node w2, which is down"]
    await served.cleanup()
