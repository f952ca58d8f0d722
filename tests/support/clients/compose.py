"""Docker Compose of any version, in the directory of one project."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.machines.playground_rig import TestNode


class Compose:
    """Runs Compose.  ``command``: the program with common arguments.  ``environment``: further variables, in addition
    to path and host.
    """

    def __init__(
        self,
        node: TestNode,
        directory: Path,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._command = command
        self._environment = {
            # docker-compose 1 runs the docker command for exec, and setup may have installed it only in the
            # interpreter's directory.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "HOME": "/nonexistent",
            "DOCKER_HOST": node.socket,
            **(environment or {}),
        }

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self._command, "--ansi", "never", *words],
            cwd=self.directory,
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=90,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
        return done

    def __call__(self, *words: str, check: bool = True) -> str:
        """Run Compose and return its output, with its errors if it may fail."""
        done = self.run(*words, check=check)
        return done.stdout if check else done.stdout + done.stderr
