"""Whether this machine runs programs of other platforms: natively, or by an emulator that the kernel starts.

The kernel's ``binfmt_misc`` has a handler for each processor that qemu emulates.  A handler is useful in containers
only with the flag F, by which the kernel opened the emulator when the handler was registered.

Source: Linux, Documentation/admin-guide/binfmt-misc.rst; buildkit, util/archutil.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from skep.engine.images.platforms import ImagePlatform, best_platform, compatible, normalized
from skep.errors import FailedPrecondition

HANDLERS = Path("/proc/sys/fs/binfmt_misc")
_PROCESSORS = {
    "386": (1, "little", 3),
    "amd64": (2, "little", 62),
    "arm": (1, "little", 40),
    "arm64": (2, "little", 183),
    "loong64": (2, "little", 258),
    "mips64le": (2, "little", 8),
    "ppc64le": (2, "little", 21),
    "riscv64": (2, "little", 243),
    "s390x": (2, "big", 22),
}
"""Class (1: 32 bits, 2: 64 bits), byte order and number of each processor in an ELF header."""
_EXECUTABLE = 2
"""Type of a program in an ELF header (ET_EXEC)."""


class Emulator(msgspec.Struct, frozen=True):
    """Entry of ``binfmt_misc``: the bytes with which the programs start, and the flags of their interpreter."""

    magic: bytes
    mask: bytes = b""
    offset: int = 0
    flags: str = ""

    def runs(self, header: bytes) -> bool:
        """Return whether programs that start with ``header`` run in every container."""
        mask = self.mask or b"\xff" * len(self.magic)
        part = header[self.offset : self.offset + len(self.magic)]
        is_same = len(part) == len(self.magic) and all(
            (have ^ want) & bits == 0 for have, want, bits in zip(part, self.magic, mask, strict=True)
        )
        return is_same and "F" in self.flags


def parse_emulator(text: str) -> Emulator | None:
    """Parse the kernel's file of a handler.  None if it is disabled, or recognizes programs by their name."""
    lines = [line.strip() for line in text.splitlines()]
    words = dict(line.rpartition(" ")[::2] for line in lines if " " in line)
    if "enabled" not in lines or "magic" not in words:
        return None
    return Emulator(
        magic=bytes.fromhex(words["magic"]),
        mask=bytes.fromhex(words.get("mask", "")),
        offset=int(words.get("offset", "0")),
        flags=words.get("flags:", ""),
    )


def read_emulators(directory: Path = HANDLERS) -> Sequence[Emulator]:
    """Return the enabled handlers of this machine.  Blocks for a moment."""
    found = []
    with suppress(OSError):
        if (directory / "status").read_text().strip() != "enabled":
            return []
        for file in sorted(directory.iterdir()):
            if file.name not in ("register", "status"):
                with suppress(OSError, ValueError):
                    found.append(parse_emulator(file.read_text()))
    return [one for one in found if one is not None]


def _header(architecture: str) -> bytes:
    """Return the start of a program for a processor.  Empty for an unknown one."""
    if architecture not in _PROCESSORS:
        return b""
    bits, order, number = _PROCESSORS[architecture]
    start = b"\x7fELF" + bytes([bits, 1 if order == "little" else 2, 1]).ljust(12, b"\0")
    return start + b"".join(
        value.to_bytes(2, "little" if order == "little" else "big") for value in (_EXECUTABLE, number)
    )


def emulated(handlers: Sequence[Emulator], here: ImagePlatform | None = None) -> Sequence[ImagePlatform]:
    """Return the other platforms whose programs a machine runs with these handlers."""
    own = {one.architecture for one in compatible(here or best_platform())}
    found = [name for name in _PROCESSORS if any(one.runs(_header(name)) for one in handlers)]
    return [normalized(ImagePlatform("linux", name)) for name in found if name not in own]


def require_runnable(
    platform: ImagePlatform, handlers: Sequence[Emulator], here: ImagePlatform | None = None
) -> None:
    """Check that a machine runs programs of a platform.  Raises: FailedPrecondition: with the remedy."""
    wanted, here = normalized(platform), here or best_platform()
    own = {one.architecture for one in compatible(here)}
    if wanted.architecture in own or any(one.runs(_header(wanted.architecture)) for one in handlers):
        return
    raise FailedPrecondition(
        f"this node runs programs for {here.os}/{here.architecture}, and has no emulator for {wanted}: install the "
        f"package qemu-user-static on the node, or build on a node for {wanted}"
    )
