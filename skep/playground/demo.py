"""The demo: a small cluster with a service of real containers, and suggestions for next steps."""

import asyncio
import os
import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import click

from skep.api.client.client import ApiClient
from skep.cli.passthrough import find_docker
from skep.errors import FailedPrecondition, Unavailable, reason_of
from skep.linux.commands import communicate
from skep.playground import node
from skep.playground.description import PlaygroundDescription
from skep.playground.images import nginx
from skep.playground.playground import Playground
from skep.playground.relay import LOOPBACK

SERVICE = "web"
# One replica for each node: the manager and two workers.
REPLICAS = 3
WORKERS = 2
ANY_ADDRESS = "0.0.0.0"
"""Serves on all addresses of this machine.  Loopback is one of them."""
FIRST_PORT, PORTS_TRIED = 8080, 100
"""The demo's service is published at the first free port of this machine, starting with FIRST_PORT."""
_NEXT_COMMANDS = (
    (f"docker service scale {SERVICE}=9", "run more replicas"),
    ("docker kill $(docker ps -q | head -n 1)", "kill a container: Skep replaces it"),
    (f"docker service ps {SERVICE}", "see where its tasks run, and what ended"),
    (f"skep explain {SERVICE}", "read why the service is in its state"),
    ("skep top", "watch nodes and services; q ends it"),
    ("skep ui", "open the dashboard in a browser"),
)
_CREATE_WITHIN_S = 120
"""Time limit in seconds for a docker command that waits for the service's tasks."""
_RESPONSE_TIMEOUT_S = 10
"""Time limit in seconds for one response of the demo's service."""


async def demo(playground: Playground, address: str = LOOPBACK, image: Path | None = None) -> None:
    """Start the demo, or show its state if it runs already.

    Args:
        address: address of this machine at which the service answers.
        image: archive of the service's image, which is built from the distribution's packages otherwise.

    Raises: SkepError: the demo cannot be started.
    """
    cluster = playground.described()
    if cluster is None:
        cluster = await _build(playground, address, image)
    elif not all(node.is_up(known) for known in cluster.nodes):
        raise FailedPrecondition(
            "The demo is incomplete, or one of its nodes is down. Run make demo-down first."
        )
    await _show(cluster, playground, LOOPBACK if address == ANY_ADDRESS else address)
    if image is None:  # make demo, not the image of the playground, which removes the demo when it ends
        click.echo("\nRun make demo-down to remove everything.")


async def _build(playground: Playground, address: str, image: Path | None) -> PlaygroundDescription:
    click.secho("1. Start a cluster of one manager and two workers", bold=True)
    cluster = await playground.up(managers=1, workers=WORKERS, relays=address)
    if image is None:
        click.secho("2. Build an nginx image from the distribution's packages", bold=True)
        image = playground.images / "nginx.tar"
        image.write_bytes((await nginx.nginx_archive()).data)
    else:
        click.secho("2. Load an nginx image", bold=True)
    await playground.load(image)
    command = ["service", "create", "--name", SERVICE, "--replicas", str(REPLICAS)]
    command += ["--publish", f"published={free_port(partial(_is_free, address))},target=80"]
    command += ["--publish", "mode=host,target=80", "--no-resolve-image", nginx.TAG]
    click.secho(f"3. Create a service: docker {' '.join(command)}", bold=True)
    await _docker(cluster.nodes[0].endpoint, *command)
    return cluster


async def _show(cluster: PlaygroundDescription, playground: Playground, host: str) -> None:
    """Check that the service responds at ``host``, and print the next commands."""
    first = cluster.nodes[0]
    await _docker(first.endpoint, "service", "ps", SERVICE)
    port = await _mesh_port(cluster)
    address = f"{host}:{await playground.wait_relayed(port)}"
    click.echo(f"\nhttp://{address} responds: {await asyncio.to_thread(_get, address)}")
    click.echo(
        f"Port {port} of every node leads to all replicas (the routing mesh). Each replica also has its own port on "
        "its node.\n"
    )
    click.secho("Try these commands:", bold=True)
    if not (shutil.which("docker") and shutil.which("skep")):
        click.echo(f"  export PATH={Path(sys.prefix) / 'bin'}:$PATH")
    click.echo(f"  export DOCKER_HOST={first.endpoint}")
    for command, effect in _NEXT_COMMANDS:
        click.echo(f"  {command:42}# {effect}")


async def _docker(endpoint: str, *words: str) -> None:
    """Run docker in the user's terminal, so that its progress is displayed there.

    Raises: FailedPrecondition: it failed (the reason was printed); Unavailable: it takes too long.
    """
    environment = {**os.environ, "DOCKER_HOST": endpoint}
    environment.pop("DOCKER_CONTEXT", None)
    process = await asyncio.create_subprocess_exec(find_docker(), *words, env=environment)
    try:
        await communicate(process, _CREATE_WITHIN_S)
    except TimeoutError as error:
        raise Unavailable(f"docker {' '.join(words)}: did not finish within {_CREATE_WITHIN_S} s") from error
    if process.returncode:
        raise FailedPrecondition(f"docker {' '.join(words)} failed with exit code {process.returncode}")


async def _mesh_port(cluster: PlaygroundDescription) -> int:
    """Return the port at which the routing mesh publishes the service.  Raises: Unavailable: it has no port yet."""
    async with ApiClient.at(cluster.nodes[0].endpoint) as manager:
        service: dict[str, Any] = await manager.get(f"/services/{SERVICE}")
    for port in service["Endpoint"].get("Ports") or ():
        if port["PublishMode"] == "ingress":
            return int(port["PublishedPort"])
    raise Unavailable(f"the service {SERVICE} publishes no port on every node")


def free_port(is_free: Callable[[int], bool]) -> int:
    """Return the first free port for the service.  Raises: FailedPrecondition: all are taken."""
    for port in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED):
        if is_free(port):
            return port
    raise FailedPrecondition(
        f"ports {FIRST_PORT} to {FIRST_PORT + PORTS_TRIED - 1} of this machine are in use. Free one of them and "
        "rerun the command."
    )


def _is_free(address: str, port: int) -> bool:
    """Return whether the port is free at ``address``, where the playground will serve it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _get(address: str) -> str:
    """Return the service's response to a request at ``address``.  Raises: Unavailable."""
    connection = HTTPConnection(address, timeout=_RESPONSE_TIMEOUT_S)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read().decode(errors="replace").strip()
    except (OSError, HTTPException) as error:
        raise Unavailable(f"http://{address} does not respond: {reason_of(error)}") from error
    finally:
        connection.close()
