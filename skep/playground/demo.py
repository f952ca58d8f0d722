"""The demo: a small cluster with a service of real containers, and what to try next."""

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from skep.api.client import Client
from skep.cli.passthrough import find_docker
from skep.errors import FailedPrecondition, Unavailable
from skep.linux.commands import communicate
from skep.playground import nginx, node
from skep.playground.commands import run
from skep.playground.description import Cluster
from skep.playground.playground import Playground

SERVICE = "web"
REPLICAS = 3
WORKERS = 2
_CREATE_WITHIN_S = 120


async def demo(playground: Playground) -> None:
    """Bring the demo up, or say how it is if it is up already.

    Raises: SkepError: what is in the way, as a sentence.
    """
    cluster = playground.described()
    if cluster is None:
        cluster = await _build(playground)
    elif not all(node.is_up(known) for known in cluster.nodes):
        raise FailedPrecondition(
            "the demo was left half-way, or a node of it is down: run `make demo-down` first"
        )
    await _show(cluster)


async def _build(playground: Playground) -> Cluster:
    click.secho("1. a cluster: one manager, two workers, each in namespaces of its own", bold=True)
    cluster = await playground.up(managers=1, workers=WORKERS)
    click.secho("2. an image: nginx out of the distribution's packages, no registry asked", bold=True)
    archive = playground.images / "nginx.tar"
    built = await nginx.nginx_archive()
    archive.write_bytes(built.data)
    await playground.load(archive)
    command = ["service", "create", "--name", SERVICE, "--replicas", str(REPLICAS)]
    command += ["--publish", "mode=host,target=80", "--no-resolve-image", nginx.TAG]
    click.secho(f"3. a service: docker {' '.join(command)}", bold=True)
    await _docker(cluster.nodes[0].endpoint, *command)
    return cluster


async def _show(cluster: Cluster) -> None:
    """Prove that it answers, and name the next commands."""
    first = cluster.nodes[0]
    await _docker(first.endpoint, "service", "ps", SERVICE)
    address = await _an_address(cluster)
    click.echo(f"\nhttp://{address} answers: {await _ask(cluster, address)}\n")
    click.secho("Try next:", bold=True)
    if not shutil.which("docker"):
        click.echo(f"  export PATH={Path(sys.prefix) / 'bin'}:$PATH")
    click.echo(f"  export DOCKER_HOST={first.endpoint}")
    click.echo(f"  docker service scale {SERVICE}=9                # more of them")
    click.echo("  docker kill $(docker ps -q | head -n 1)   # break one of this node's, it is replaced:")
    click.echo(f"  docker service ps {SERVICE}")
    click.echo("\nmake demo-down removes everything.")


async def _docker(endpoint: str, *words: str) -> None:
    """Run docker in the user's terminal, so that its progress display is theirs.

    Raises: FailedPrecondition: it failed (it has said why).  Unavailable: it takes too long.
    """
    environment = {**os.environ, "DOCKER_HOST": endpoint}
    environment.pop("DOCKER_CONTEXT", None)
    process = await asyncio.create_subprocess_exec(find_docker(), *words, env=environment)
    try:
        await communicate(process, _CREATE_WITHIN_S)
    except TimeoutError as error:
        raise Unavailable(f"docker {' '.join(words)}: not done after {_CREATE_WITHIN_S} s") from error
    if process.returncode:
        raise FailedPrecondition(f"docker {' '.join(words)} failed with exit code {process.returncode}")


async def _an_address(cluster: Cluster) -> str:
    """Where one running replica answers: address of its node and the port that it got there.

    Raises: Unavailable: none says where it is.
    """
    async with Client.at(cluster.nodes[0].endpoint) as manager:
        nodes: list[dict[str, Any]] = await manager.get("/nodes")
        tasks: list[dict[str, Any]] = await manager.get("/tasks", filters={"service": [SERVICE]})
    names = {known["ID"]: known["Description"]["Hostname"] for known in nodes}
    for task in tasks:
        for port in (task["Status"].get("PortStatus") or {}).get("Ports") or ():
            if task["Status"]["State"] == "running" and task["DesiredState"] == "running":
                return f"{cluster.node(names[task['NodeID']]).addr}:{port['PublishedPort']}"
    raise Unavailable(f"no replica of {SERVICE} has published its port")


async def _ask(cluster: Cluster, address: str) -> str:
    """What the service answers to another machine of the playground."""
    inside = f"--net={cluster.nodes[0].netns}"
    answer = await run("nsenter", inside, sys.executable, "-c", _GET, address, deadline_s=10)
    return answer.decode(errors="replace").strip()


_GET = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], timeout=5)
connection.request("GET", "/")
sys.stdout.write(connection.getresponse().read().decode())
"""
