"""The image of the demo: nginx from the distribution, with busybox for a shell inside."""

import asyncio
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from skep.playground.commands import find
from skep.playground.images.archive import Archive, ArchivedDirectory, Entry, File, image_archive
from skep.playground.images.busybox import GROUP, PASSWD, PATH, applets
from skep.playground.images.debian import program, unpack_with_libraries

TAG = "demo/nginx:1"
PROGRAM = "usr/sbin/nginx"

_CONFIGURATION = b"""\
# Every answer names the container that gave it.
user nobody nogroup;
worker_processes 1;
daemon off;
pid /run/nginx.pid;
events { worker_connections 512; }
http {
    access_log /dev/stdout;
    default_type text/plain;
    server {
        listen 80;
        location / { return 200 "nginx in container $hostname\\n"; }
    }
}
"""


async def nginx_archive() -> Archive:
    """Fetch the packages (12 MB) and build the image in a few seconds.

    Raises: FailedPrecondition, Unavailable: apt cannot fetch the packages.
    """
    with tempfile.TemporaryDirectory(prefix="skep-image-") as temporary:
        directory = Path(temporary)
        await unpack_with_libraries(directory, "nginx")
        packaged_at = datetime.fromtimestamp(int((directory / "root" / PROGRAM).stat().st_mtime), UTC)
        entries: dict[str, Entry] = {
            **await applets(Path(find("busybox"))),
            **program(PROGRAM, directory),
            "dev": ArchivedDirectory(),
            "etc/group": GROUP,
            "etc/nginx/nginx.conf": File(_CONFIGURATION),
            "etc/passwd": PASSWD,
            "proc": ArchivedDirectory(),
            "root": ArchivedDirectory(0o700),
            "run": ArchivedDirectory(),
            "sys": ArchivedDirectory(),
            "tmp": ArchivedDirectory(0o1777),
            "usr/share/nginx": ArchivedDirectory(),
            "var/lib/nginx": ArchivedDirectory(),
            "var/log/nginx": ArchivedDirectory(),
        }
    config = {
        "Cmd": ["nginx", "-e", "stderr"],
        "Env": [f"PATH={PATH}"],
        "ExposedPorts": {"80/tcp": {}},
        # SIGQUIT, as in the official image, because SIGTERM would interrupt running requests.
        "StopSignal": "SIGQUIT",
    }
    return image_archive(
        entries, tags=[TAG], created=packaged_at.strftime("%Y-%m-%dT%H:%M:%SZ"), config=config
    )


if __name__ == "__main__":
    sys.stdout.buffer.write(asyncio.run(nginx_archive()).data)
