"""Stacks of the talks: deployed by the docker command, seen from inside."""

from pathlib import Path

from tests.support.playground_rig import TestNode, container_pids


def deploy(node: TestNode, directory: Path, name: str, file: str) -> str:
    """``docker stack deploy``; what it wrote to standard error."""
    (directory / f"{name}.yml").write_text(file)
    words = ("stack", "deploy", "--resolve-image", "never", "-c", str(directory / f"{name}.yml"), name)
    return node.docker(*words).stderr


def fetched(node: TestNode, service: str, url: str) -> str:
    """What a container of ``service`` on ``node`` gets from ``url``; empty: nothing yet."""
    (id,) = container_pids(node, service)
    return node.docker("exec", id, "wget", "-q", "-O", "-", url, check=False).stdout
