"""Stacks of the talks, deployed by the docker command and tested from inside."""

from pathlib import Path

from tests.support.machines.playground_rig import TestNode, container_pids


def deploy(node: TestNode, directory: Path, name: str, file: str) -> str:
    """Run ``docker stack deploy``, and return what it wrote to standard error."""
    (directory / f"{name}.yml").write_text(file)
    words = ("stack", "deploy", "--resolve-image", "never", "-c", str(directory / f"{name}.yml"), name)
    return node.docker(*words).stderr


def fetched(node: TestNode, service: str, url: str) -> str:
    """Return what a container of ``service`` on ``node`` gets from ``url``.  Empty without a response."""
    (id,) = container_pids(node, service)
    return node.docker("exec", id, "wget", "-q", "-O", "-", url, check=False).stdout
