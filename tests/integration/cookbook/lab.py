"""A recipe of the cookbook on a playground: its files, the blocks of its page, and Debian's packages for its images."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.integration.networks.lab import outside
from tests.support.harness.documents import ROOT, shell_blocks
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    running,
)

COOKBOOK = ROOT / "docs/cookbook"
_INSTALLED = re.compile(r"apt-get install --yes --no-install-recommends ([^&\\]+)")


class Recipe:
    """Runs the commands of one page, block by block, on a machine that is no node."""

    def __init__(self, cluster: TestCluster, name: str, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.m1 = cluster.node("m1")
        self.blocks = shell_blocks(f"docs/cookbook/{name}.md")
        self._remaining = iter(self.blocks)

    def next(self, **environment: str) -> str:
        """Run the next block of the page, and return what it printed."""
        return self.run(next(self._remaining), **environment)

    def run(self, commands: str, **environment: str) -> str:
        """Run commands there.  ``NODE`` is the address of a node."""
        done = subprocess.run(
            ["nsenter", f"--net={outside(self.cluster)}", "bash", "-e", "-o", "pipefail", "-c", commands],
            cwd=self.directory,
            env={
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HOME": str(self.directory),
                "DOCKER_HOST": self.m1.socket,
                "NODE": self.m1.description["addr"],
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def assert_complete(self) -> None:
        """Check that every block of the page was run."""
        assert list(self._remaining) == []

    def places(self, service: str) -> list[str]:
        """Return the names of the nodes of a service's running tasks, in the order of their slots."""
        tasks = sorted(running(self.m1, service), key=lambda task: task["Slot"])
        inspect = self.m1.client().api.inspect_node
        return [inspect(task["NodeID"])["Description"]["Hostname"] for task in tasks]

    def kill(self, service: str) -> None:
        """Kill the first process of one of the service's containers."""
        for node in self.cluster.nodes():
            for pid in container_pids(node, service).values():
                node.kill(pid)
                return
        raise AssertionError(f"{service} has no container")


@contextmanager
def a_recipe(
    name: str, *, workers: int = 2, configuration: str = "", packages: Sequence[str] = ()
) -> Iterator[Recipe]:
    """Bring up a playground with ``debian:12``, its ``packages``, and those that the recipe's images install.

    No task runs on its only manager, so that a test can kill any node with tasks.
    """
    nodes = ["m1", *(f"w{number + 1}" for number in range(workers))]
    configured = dict.fromkeys(nodes, configuration) if configuration else {}
    with a_playground(name, configured=configured, managers=1, workers=workers) as cluster:
        directory = cluster.directory / "recipe"
        shutil.copytree(COOKBOOK / name, directory)
        _load_debian(cluster.node("m1"), directory, packages)
        cluster.node("m1").docker("node", "update", "--availability", "drain", "m1")
        yield Recipe(cluster, name, directory)


def _load_debian(node: TestNode, directory: Path, more: Sequence[str]) -> None:
    files = "".join(path.read_text() for path in directory.rglob("Dockerfile"))
    packages = sorted({*more, *(word for words in _INSTALLED.findall(files) for word in words.split())})
    tarball = directory.parent / "debian.tar"
    made = subprocess.run(
        [ROOT / "setup/debian-image.sh", "bookworm", tarball, *packages],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    node.docker("import", str(tarball), "debian:12")
    tarball.unlink()
