"""The image that every node of a playground has: the distribution's static busybox."""

from datetime import UTC, datetime
from pathlib import Path

from skep.errors import FailedPrecondition
from skep.playground.commands import find, run
from skep.playground.images import elf
from skep.playground.images.archive import (
    Archive,
    ArchivedDirectory,
    Entry,
    File,
    SymbolicLink,
    image_archive,
)

TAGS = ("busybox:1", "busybox:latest")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PASSWD = File(b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n")
GROUP = File(b"root:x:0:\nnogroup:x:65534:\n")


async def busybox_archive() -> Archive:
    """Return an image archive of busybox with all its applets.

    Raises: FailedPrecondition: busybox is missing or not static.
    """
    busybox = Path(find("busybox"))
    created = datetime.fromtimestamp(int(busybox.stat().st_mtime), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    entries = {
        "dev": ArchivedDirectory(),
        "etc/group": GROUP,
        "etc/passwd": PASSWD,
        "proc": ArchivedDirectory(),
        "root": ArchivedDirectory(0o700),
        "sys": ArchivedDirectory(),
        "tmp": ArchivedDirectory(0o1777),
        "var/tmp": ArchivedDirectory(0o1777),
        **await applets(busybox),
    }
    config = {"Cmd": ["sh"], "Env": [f"PATH={PATH}"]}
    return image_archive(entries, tags=TAGS, created=created, config=config)


async def applets(busybox: Path) -> dict[str, Entry]:
    """Return ``bin/busybox`` and a link for each of its commands.

    Raises: FailedPrecondition: it is linked dynamically, so it would not run in an image without libraries.
    """
    content = busybox.read_bytes()
    binary = elf.read(content)
    if binary is not None and binary.interpreter:
        raise FailedPrecondition(f"{busybox} is not static: install the package busybox-static")
    entries: dict[str, Entry] = {"bin/busybox": File(content, 0o755)}
    listed = await run(str(busybox), "--list")
    for name in listed.decode().split():
        if name != "busybox":
            entries[f"bin/{name}"] = SymbolicLink("busybox")
    return entries
