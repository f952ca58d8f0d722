"""OpenSSH's client with the test's own settings, independent of the user's."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.machines.playground_rig import wait_until


def write_client(folder: Path, server: str, host_key: str, *options: str) -> dict[str, str]:
    """Write an ``ssh`` command that knows servers with one key and logs in with the key ``folder/user``.

    Return the environment in which a client finds this command.

    Args:
        server: its name in ``known_hosts``: ``192.0.2.1``, or ``[192.0.2.1]:2222``.  Commas separate several.
        options: further lines of the client's configuration.
    """
    (folder / "known").write_text(f"{server} {host_key.strip()}\n")
    (folder / "client").write_text(
        f"UserKnownHostsFile {folder}/known\nIdentityFile {folder}/user\nIdentitiesOnly yes\n"
        + "".join(f"{line}\n" for line in options)
    )
    binaries = folder / "bin"
    binaries.mkdir()
    (binaries / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
    (binaries / "ssh").chmod(0o755)
    return {"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(folder)}


@contextmanager
def a_forwarded_socket(
    folder: Path, remote: str, *destination: str, environment: Mapping[str, str], within: Sequence[str] = ()
) -> Iterator[str]:
    """Run ``ssh -L``, and yield the URL of a local socket that leads to ``remote``.

    ``within``: a command that runs ssh elsewhere.
    """
    local = folder / "forwarded.sock"
    options = ("-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{local}:{remote}")
    with subprocess.Popen([*within, "ssh", *options, *destination], env=environment) as tunnel:
        try:
            wait_until(local.exists, "the socket is forwarded")
            yield f"unix://{local}"
        finally:
            tunnel.kill()  # a SIGTERM just before ssh polls is lost
