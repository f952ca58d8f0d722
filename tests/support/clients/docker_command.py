"""The ``skep`` command with a docker command that prints its arguments."""

import os
import subprocess
import sys
from pathlib import Path


def skep(directory: Path, *words: str) -> str:
    """Run ``skep`` and return its output, in which docker's arguments are lines of their own."""
    docker = directory / "docker"
    docker.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    docker.chmod(0o755)
    command = [sys.executable, "-c", "from skep.cli.main import main; main()", *words]
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout
