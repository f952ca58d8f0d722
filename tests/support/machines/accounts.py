"""A mount namespace with the user ``dockremap`` and its subordinate ids, as ``userns-remap`` needs them."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.machines.playground_rig import SKEP

FIRST = 500_000_000
"""The machine's id of a container's root.  No other user of the machine has it."""

_ENTRIES = {
    "passwd": "dockremap:x:399:399::/nonexistent:/bin/false\n",
    "group": "dockremap:x:399:\n",
    "subuid": f"dockremap:{FIRST}:65536\n",
    "subgid": f"dockremap:{FIRST}:65536\n",
}


@contextmanager
def with_dockremap() -> Iterator[tuple[str, ...]]:
    """Yield the beginning of a command that runs in such a namespace.  The machine's own files do not change."""
    with tempfile.TemporaryDirectory(prefix="skep-accounts-", dir="/var/tmp") as name:
        place = Path(name)
        place.chmod(0o711)
        for part in ("upper", "work"):
            (place / part).mkdir(mode=0o755)
        for file, entry in _ENTRIES.items():
            known = Path("/etc", file)
            text = known.read_text() if known.exists() else ""
            kept = [line for line in text.splitlines(keepends=True) if not line.startswith("dockremap:")]
            (place / "upper" / file).write_text("".join(kept) + entry)
        # Not bind mounts of single files, which disappear when another program replaces the machine's file.
        options = f"lowerdir=/etc,upperdir={place}/upper,workdir={place}/work"
        accounts = f"mount -t overlay -o {options} overlay /etc"
        # A real dockerd makes the mapped root the owner of /dev/null, which is the machine's.
        null = f"mknod {place}/null c 1 3 && chmod 666 {place}/null && mount --bind {place}/null /dev/null"
        pin = place / "pins"
        pin.mkdir()
        _run("mount", "--bind", str(pin), str(pin))
        try:
            _run("mount", "--make-private", str(pin))
            (pin / "ns").touch()
            _run(
                "unshare",
                f"--mount={pin}/ns",
                "--propagation",
                "private",
                "sh",
                "-ec",
                f"{accounts} && {null}",
            )
            try:
                yield "nsenter", f"--mount={pin}/ns", "--"
            finally:
                _run("umount", str(pin / "ns"))
        finally:
            _run("umount", str(pin))


def skep_with(enter: tuple[str, ...], directory: Path) -> str:
    """Write a program that runs skep after ``enter``, and return its path."""
    path = directory / "skep"
    path.write_text(f'#!/bin/sh\nexec {" ".join(enter)} {SKEP} "$@"\n')
    path.chmod(0o755)
    return str(path)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
