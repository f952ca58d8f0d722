"""Sends the result of a build to its client: as an archive, or file by file in fsutil's protocol.

The engine lists the files of the result, and the client requests the contents of files that it does not have.  The
contents are read from an archive on the engine's disk, so the result is never unpacked.

Source: moby/buildkit, session/filesync, exporter/local, exporter/tar; tonistiigi/fsutil, send.go, walker.go, stat.go.
"""

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec

from skep.aio.groups import errors_as_they_are
from skep.engine.build.stage import Changes, mounted_image, new_work
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.protocol.sessions import BuildSession, Messages
from skep.engine.engine import Engine
from skep.engine.images.digest import Digest
from skep.engine.volumes.files_worker import go_mode
from skep.errors import InvalidArgument, ResourceExhausted, Unavailable

FILE_SEND = "/moby.filesync.v1.FileSend/DiffCopy"

_PIECE_BYTES = 256 << 10
"""Four pieces fill the window of a stream, so that reading and sending overlap."""
_LISTED_AT_ONCE = 256
"""Files that are listed before other tasks of the event loop run."""
_XATTR_RECORD = "SCHILY.xattr."
_KINDS = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
}


OpenArchive = Callable[[Digest], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Opens the whole file system of an image as a tar, in pieces.  Reading raises at the end if the tar is incomplete.

Raises: NotFound: the image was removed.
"""


@asynccontextmanager
async def image_archive(engine: Engine, image_id: Digest) -> AsyncIterator[AsyncIterator[bytes]]:
    """Open the file system of an engine's image.  See ``OpenArchive``."""
    images = engine.images
    image = images.get(image_id)
    async with images.pin(image.chain), images.workspace("result") as workspace:
        changes = Changes(workspace, images.layers(image))
        async with (
            mounted_image(changes, new_work(images, workspace)) as root,
            engine.files.archive(root) as pieces,
        ):
            yield pieces


_GO_SYMLINK = go_mode(stat.S_IFLNK)


class SentFile(msgspec.Struct, frozen=True):
    """Entry of the result.  ``begin``: Offset of its content in the archive.  None without content."""

    stat: pb.Stat
    begin: int | None = None


async def send_archive(
    session: BuildSession, pieces: AsyncIterable[bytes], progress: Callable[[int], None]
) -> None:
    """Send an archive to the client (``--output type=tar``).

    ``progress``: Called with the number of bytes sent so far.

    Raises: SkepError: with the client's status, or the client disconnected.
    """
    sent = 0
    async with session.stream(FILE_SEND, silent_s=session.silent_s) as messages:
        async for piece in pieces:
            await messages.send(pb.BytesMessage(data=piece))
            progress(sent := sent + len(piece))
        await messages.finish()


async def send_tree(
    session: BuildSession, archive: Path, progress: Callable[[int], None], *, below: str = ""
) -> None:
    """Send the files of ``archive``, a plain tar, to the client (``--output type=local``).

    ``below``: New directory for the files.  Empty for the client's directory itself.

    Raises: as ``send_archive``.
    """
    files = await asyncio.to_thread(listed, archive)
    files = moved_below(files, below) if below else files
    descriptor = os.open(archive, os.O_RDONLY | os.O_CLOEXEC)
    try:
        async with (
            session.stream(FILE_SEND, silent_s=session.silent_s) as messages,
            errors_as_they_are(),
            asyncio.TaskGroup() as group,
        ):
            group.create_task(_list(messages, files), name="list the files of a build")
            await _serve(messages, files, descriptor, progress)
            await messages.send(pb.Packet(type=pb.Packet.FIN))
            await messages.finish()
    finally:
        os.close(descriptor)


async def _list(messages: Messages, files: Sequence[SentFile]) -> None:
    for number, file in enumerate(files):
        await messages.send(pb.Packet(type=pb.Packet.STAT, stat=file.stat))
        if number % _LISTED_AT_ONCE == 0:
            await asyncio.sleep(0)  # otherwise no other task would run while the client reads fast
    await messages.send(pb.Packet(type=pb.Packet.STAT))


async def _serve(
    messages: Messages, files: Sequence[SentFile], descriptor: int, progress: Callable[[int], None]
) -> None:
    """Send the requested contents until the client is done.  Raises: InvalidArgument, Unavailable."""
    sent = 0
    while (packet := await _next(messages)).type != pb.Packet.FIN:
        if packet.type != pb.Packet.REQ or packet.id >= len(files) or files[packet.id].begin is None:
            raise InvalidArgument(f"the client requested entry {packet.id}, which is not a file")
        async for piece in _content(descriptor, files[packet.id]):
            await messages.send(pb.Packet(type=pb.Packet.DATA, id=packet.id, data=piece))
            progress(sent := sent + len(piece))
        await messages.send(pb.Packet(type=pb.Packet.DATA, id=packet.id))


async def _content(descriptor: int, file: SentFile) -> AsyncIterator[bytes]:
    assert file.begin is not None
    position, end = file.begin, file.begin + file.stat.size
    while position < end:
        piece = await asyncio.to_thread(os.pread, descriptor, min(_PIECE_BYTES, end - position), position)
        position += len(piece)
        yield piece


async def _next(messages: Messages) -> pb.Packet:
    data = await messages.receive()
    if data is None:
        raise Unavailable("the client ended the transfer of the result early")
    packet = pb.Packet.FromString(data)
    if packet.type == pb.Packet.ERR:
        raise Unavailable(f"error from receiver: {packet.data.decode(errors='replace')}")
    return packet


async def spool(
    pieces: AsyncIterable[bytes], target: Path, room_bytes: int, what: str = "the result of the build"
) -> None:
    """Write an archive to a new file.  Raises: ResourceExhausted: it is larger than ``room_bytes``; OSError."""
    size = 0
    with target.open("xb") as file:
        async for piece in pieces:
            size += len(piece)
            if size > room_bytes:
                raise ResourceExhausted(f"no space left on device for {what}")
            await asyncio.to_thread(file.write, piece)


def listed(archive: Path) -> Sequence[SentFile]:
    """Return the entries of a plain tar in walk order: names in a directory sorted by their bytes.  Blocks.

    Of several hard links, the first in that order has the content, even if another one has it in the archive.
    """
    with tarfile.open(archive, "r:", encoding="utf-8", errors="surrogateescape") as opened:
        members = {member.name: member for member in opened if member.name}
    walk = sorted(members, key=lambda name: name.encode("utf-8", "surrogateescape").split(b"/"))
    firsts: dict[str, str] = {}
    found = []
    for name in walk:
        member = members[name]
        content = members[member.linkname] if member.islnk() else member
        first = firsts.setdefault(content.name, name) if content.isreg() else name
        found.append(_sent(name, content, link=first if first != name else ""))
    return found


def moved_below(files: Sequence[SentFile], directory: str) -> Sequence[SentFile]:
    """Return the entries in a new directory, which comes first."""
    top = directory.encode()
    found = [SentFile(pb.Stat(path=top, mode=go_mode(stat.S_IFDIR | 0o755)))]
    for file in files:
        moved = pb.Stat()
        moved.CopyFrom(file.stat)
        moved.path = top + b"/" + file.stat.path
        if file.stat.linkname and not moved.mode & _GO_SYMLINK:
            moved.linkname = top + b"/" + file.stat.linkname
        found.append(SentFile(moved, file.begin))
    return found


def _sent(name: str, member: tarfile.TarInfo, *, link: str) -> SentFile:
    """Describe an entry.  ``link``: The earlier path that it is a hard link to.  Empty if it is not one."""
    attributes = {
        record.removeprefix(_XATTR_RECORD): value.encode("utf-8", "surrogateescape")
        for record, value in member.pax_headers.items()
        if record.startswith(_XATTR_RECORD)
    }
    described = pb.Stat(
        path=name.encode("utf-8", "surrogateescape"),
        mode=go_mode(member.mode | _KINDS.get(member.type, stat.S_IFREG)),
        uid=member.uid,
        gid=member.gid,
        size=member.size if member.isreg() and not link else 0,
        mod_time=int(member.mtime) * 1_000_000_000,
        linkname=(member.linkname if member.issym() else link).encode("utf-8", "surrogateescape"),
        devmajor=member.devmajor,
        devminor=member.devminor,
        xattrs={} if link else attributes,
    )
    return SentFile(described, member.offset_data if member.isreg() and not link else None)
