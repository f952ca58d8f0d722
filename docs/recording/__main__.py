"""Records the README's terminal: a service on a real cluster, whose leader then loses its power.

::

    .venv/bin/python -m docs.recording              # as root, less than a minute; writes docs/recording.svg

The commands run in a pseudo-terminal on a playground of three managers and two workers.  Their output appears when
they print it, but waits are shortened to three seconds.  The typing is made up, and the pauses for reading.
"""

import argparse
import os
import pty
import select
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from typing import NamedTuple

from docs.recording.picture import Screen, draw
from docs.recording.terminal import Terminal
from tests.support.machines.playground_rig import IDLE, IMAGE, SKEP, TestCluster, a_playground

PICTURE = Path(__file__).parents[1] / "recording.svg"
COLUMNS, ROWS = 100, 17
TITLE = (
    "A terminal: a service is created, the leader loses its power, the service is scaled within about a second, "
    "and skep explain says why another service does not run"
)
_WAIT_MAX_S = 3.0
"""Longest wait between two outputs, in seconds.  A reader does not look at a still picture for longer."""
_TYPED_S = 0.8
"""Seconds that typing a command takes."""
_COMMAND_TIMEOUT_S = 60
_THROUGH = "m2"
_IMAGES = ("shop/web:1", "shop/db")


class Step(NamedTuple):
    """A command that is shown, and how long the reader has to read its output."""

    command: str
    read_s: float = 2.5
    is_new_screen: bool = False


_CONSTRAINED = (
    "docker service create -d --no-resolve-image --name db --constraint node.labels.disk==ssd shop/db"
)
SCRIPT = (
    Step("docker node ls --format 'table {{.Hostname}}\\t{{.Status}}\\t{{.ManagerStatus}}'", 2),
    Step("docker service create --no-resolve-image --name web --replicas 6 shop/web:1", 2),
    Step("skep playground cut m1 && skep playground kill m1    # the leader loses its power", 0.5, True),
    Step("docker service scale --detach web=12", 1.5),
    Step("time skep service wait web", 2.5),
    Step("docker node ls --format 'table {{.Hostname}}\\t{{.Status}}\\t{{.ManagerStatus}}'", 4),
    Step(_CONSTRAINED, 1, True),
    Step("skep explain db", 5),
    Step("docker node update --label-add disk=ssd w1", 0.5),
    Step("skep service wait db", 5),
)


def record(directory: Path) -> tuple[list[Screen], float]:
    """Run the script on a cluster.  Return what the terminal showed, and the length in seconds."""
    terminal, screens, now = Terminal(COLUMNS, ROWS), list[Screen](), 0.0
    with a_playground("recording", managers=3, workers=2) as cluster:
        environment = _prepare(cluster, directory)
        for step in SCRIPT:
            if step.is_new_screen:
                terminal.clear()
            prompt = Screen(now, _typed(terminal, ""))
            now += _TYPED_S
            screens += [prompt, Screen(now, _typed(terminal, step.command))]
            last = time.monotonic()
            for output in _output(step, environment, directory):
                now += min(time.monotonic() - last, _WAIT_MAX_S)
                last = time.monotonic()
                terminal.write(output)
                screens.append(Screen(now, terminal.rows()))
            now += step.read_s
    return screens, now


def _typed(terminal: Terminal, command: str) -> tuple[tuple, ...]:
    """Print the prompt, or the command behind it."""
    terminal.write(f"\x1b[1m{command}\x1b[0m\r\n" if command else "\x1b[33m$ \x1b[0m")
    return terminal.rows()


def _prepare(cluster: TestCluster, directory: Path) -> Mapping[str, str]:
    """Load the image, and return the environment of the commands."""
    node = cluster.node(_THROUGH)

    node.docker("create", "--name", "web", IMAGE, *IDLE)
    for image in _IMAGES:
        node.docker("commit", "web", image)
    node.docker("rm", "web")
    archive = str(directory / "image.tar")
    node.docker("save", "--output", archive, *_IMAGES)
    cluster.skep("load", archive)
    where = f"--dir {cluster.directory} --name {cluster.name}"
    command = directory / "skep"
    command.write_text(
        f'#!/bin/sh\n[ "$1" = playground ] || exec {SKEP} "$@"\n'
        f'verb=$2; shift 2; exec {SKEP} playground "$verb" {where} "$@"\n'
    )
    command.chmod(0o755)
    return {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "HOME": str(directory),
        "TERM": "xterm-256color",
        "DOCKER_HOST": node.socket,
        "TIMEFORMAT": "(took %1R s)",
        "COLUMNS": str(COLUMNS),
    }


def _output(step: Step, environment: Mapping[str, str], directory: Path) -> Iterator[str]:
    """Run the command in a pseudo-terminal, and yield its output in the pieces in which it comes."""
    own, its = pty.openpty()
    ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    deadline = time.monotonic() + _COMMAND_TIMEOUT_S
    with subprocess.Popen(
        ["bash", "-c", step.command], stdin=its, stdout=its, stderr=its, env=environment, cwd=directory
    ) as process:
        os.close(its)
        try:
            while piece := _piece(own, deadline):
                yield piece.decode(errors="replace")
        finally:
            os.close(own)
            if time.monotonic() >= deadline:
                process.kill()
        if process.wait(_COMMAND_TIMEOUT_S):
            raise SystemExit(f"{step.command}: exit code {process.returncode}")


def _piece(terminal: int, deadline: float) -> bytes:
    """Return the next output, or nothing at its end."""
    ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        raise SystemExit(f"a command took longer than {_COMMAND_TIMEOUT_S} s")
    with suppress(OSError):  # the end of a pseudo-terminal
        return os.read(terminal, 1 << 16)
    return b""


def main() -> None:
    """Record, and write the picture."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        screens, end = record(Path(folder))
    PICTURE.write_text(draw(screens, TITLE, columns=COLUMNS, end=end))


if __name__ == "__main__":
    main()
