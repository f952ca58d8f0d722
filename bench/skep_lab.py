"""A Skep playground of one manager, with the same few attributes as ``docker_lab.DockerLab``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from bench.engine import Engine
from skep.playground.description import PlaygroundNode


class SkepLab:
    """One manager in a playground, started and removed by the ``skep`` command as a user would."""

    system = "skep"

    def __init__(
        self, directory: Path, name: str = "bench", skep: Path | None = None, *, workers: int = 0
    ) -> None:
        """``name`` is a unique name of the playground.  ``skep`` is another clone's command."""
        self._workers = workers
        self.directory = directory
        self.name = name
        self.image = ""
        self._skep = str(skep or Path(sys.executable).with_name("skep"))

    def up(self, archive: bytes, image: str) -> None:
        """Start the playground and load ``archive``, so that both systems run the same image."""
        self.up_alone()
        self.engine.raw("POST", "/images/load", archive, "application/x-tar")
        self.image = image

    def up_alone(self) -> None:
        """Start the playground with its built-in image."""
        self.down()
        up = [self._skep, "playground", "up"]
        # A relay is an additional process for people.  Commands of earlier commits have neither relay nor option.
        if "--no-relay" in subprocess.run([*up, "--help"], check=True, capture_output=True, text=True).stdout:
            up.append("--no-relay")
        options = [
            "--managers",
            "1",
            "--workers",
            str(self._workers),
            "--dir",
            str(self.directory),
            "--name",
            self.name,
        ]
        subprocess.run([*up, *options], check=True, stdout=subprocess.DEVNULL)
        description = json.loads((self.directory / "cluster.json").read_text())
        self.node: dict[str, Any] = description["nodes"][0]
        self.engine = Engine(Path(self.node["endpoint"].removeprefix("unix://")))
        self.image = description["image"]

    @property
    def described(self) -> PlaygroundNode:
        """Return the playground's description of the node."""
        return msgspec.convert(self.node, PlaygroundNode)

    @property
    def netns(self) -> Path:
        return Path(self.node["netns"])

    @property
    def cgroup(self) -> str:
        """Return the cgroup of the node and its containers, below every hierarchy."""
        return str(self.node["cgroup"])

    @property
    def root_pids(self) -> list[int]:
        return list(self.node["pids"])

    def version(self) -> str:
        response: dict[str, Any] = self.engine.get("/version")
        return f"skep {response['Version']}"

    def down(self) -> None:
        command = [self._skep, "playground", "down", "--dir", str(self.directory), "--name", self.name]
        subprocess.run(command, check=False, capture_output=True)
