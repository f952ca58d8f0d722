"""HAProxy as the distribution packages it: in front of a cluster, and as an image for a service inside."""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from skep.playground.images.archive import Archive, ArchivedDirectory, Entry, image_archive
from skep.playground.images.busybox import GROUP, PASSWD, PATH
from skep.playground.images.debian import program, unpack_with_libraries
from tests.conftest import SEARCHED

IMAGE = "test/haproxy:1"
PROGRAM = "usr/sbin/haproxy"
CONFIGURATION = "/haproxy.cfg"

_GLOBAL = """\
global
    maxconn 200
defaults
    mode http
    timeout connect 10s
    timeout client 30s
    timeout server 30s
    # What goes wrong shall be seen by the client.
    retries 0
"""


def in_front_of(addresses: Sequence[str], port: int, published: int) -> str:
    """Listens on ``port``, balances over the published port of all nodes, checks none of them."""
    servers = "".join(
        f"    server node{number} {address}:{published}\n" for number, address in enumerate(addresses)
    )
    return f"{_GLOBAL}listen web\n    bind :{port}\n    balance roundrobin\n{servers}"


def following(name: str, port: int, replicas_max: int) -> str:
    """Listens on port 80 and balances over the addresses that 127.0.0.11 has for ``name``."""
    return f"""{_GLOBAL}
resolvers skep
    nameserver own 127.0.0.11:53
    accepted_payload_size 8192
    timeout resolve 200ms
    timeout retry 200ms
    hold valid 200ms
    hold obsolete 200ms
    hold nx 200ms
listen web
    bind :80
    balance roundrobin
    server-template web {replicas_max} {name}:{port} check inter 500ms resolvers skep init-addr none
"""


@contextmanager
def running(namespace: Path, configuration: str) -> Iterator[None]:
    """The machine's own haproxy in a network namespace, for the block."""
    with tempfile.NamedTemporaryFile("w", prefix="skep-haproxy-") as file:
        file.write(configuration)
        file.flush()
        command = ["nsenter", f"--net={namespace}", "haproxy", "-db", "-f", file.name]
        process = subprocess.Popen(command, env={"PATH": SEARCHED}, stderr=subprocess.PIPE, text=True)
        try:
            yield
            assert process.poll() is None, process.stderr and process.stderr.read()
        finally:
            process.terminate()
            process.communicate(timeout=20)


async def archive() -> Archive:
    """The image: the program and its libraries, as the demo builds its own.

    Raises: FailedPrecondition, Unavailable: apt cannot fetch the packages.
    """
    with tempfile.TemporaryDirectory(prefix="skep-image-") as temporary:
        directory = Path(temporary)
        await unpack_with_libraries(directory, "haproxy")
        packaged_at = datetime.fromtimestamp(int((directory / "root" / PROGRAM).stat().st_mtime), UTC)
        entries: dict[str, Entry] = {
            **program(PROGRAM, directory),
            "dev": ArchivedDirectory(),
            "etc/group": GROUP,
            "etc/passwd": PASSWD,
            "proc": ArchivedDirectory(),
            "sys": ArchivedDirectory(),
            "tmp": ArchivedDirectory(0o1777),
        }
    config = {"Cmd": ["haproxy", "-db", "-f", CONFIGURATION], "Env": [f"PATH={PATH}"]}
    return image_archive(
        entries, tags=[IMAGE], created=packaged_at.strftime("%Y-%m-%dT%H:%M:%SZ"), config=config
    )
