"""COPY, ADD and WORKDIR: files that a step puts into an image.

Source: moby 20.10, builder/dockerfile/dispatchers.go, copy.go, internals_linux.go.
"""

import os
import re
import stat
import tarfile
from pathlib import Path

import msgspec

from skep.engine.build.copying import (
    Copier,
    Ownership,
    Source,
    Tree,
    Work,
    destination_of,
    find,
)
from skep.engine.build.instructions import Copy
from skep.engine.build.stage import Changes, in_thread, new_work
from skep.engine.images.store import ImageStore
from skep.engine.images.streams import Malformed, plain_chunks
from skep.engine.images.workers import unpack
from skep.engine.users import Identity, identity
from skep.errors import InvalidArgument, Unimplemented
from skep.linux.trees import walk

NEEDS_BUILDKIT = (
    "the --{} option requires BuildKit. Refer to https://docs.docker.com/go/buildkit/ to learn how to build images"
    " with BuildKit enabled"
)
_URL = re.compile(r"https?://|git@|git://|ssh://", re.IGNORECASE)
_WITHOUT_EFFECT = ("from", "chown", "chmod", "link")


class Prepared(msgspec.Struct, frozen=True):
    """The sources of a COPY, and which of them ADD unpacks."""

    sources: tuple[Source, ...]
    archives: frozenset[str] = frozenset()


def check_copy(copy: Copy, *, is_buildkit: bool) -> None:
    """Raises: InvalidArgument, Unimplemented: an option or a source is not supported."""
    if copy.chmod and not is_buildkit:
        raise InvalidArgument(NEEDS_BUILDKIT.format("chmod"))
    for name in copy.flags:
        if name == "link" and not is_buildkit:
            raise InvalidArgument(NEEDS_BUILDKIT.format(name))
        if name not in _WITHOUT_EFFECT:
            raise Unimplemented(f"{copy.keyword} --{name} is not supported")
    for source in copy.sources:
        if _URL.match(source):
            if not copy.is_add:
                raise InvalidArgument("COPY failed: source can't be a URL for COPY")
            raise Unimplemented(
                f"ADD of a URL is not supported: fetch {source} in a RUN step or into the context"
            )


async def prepare(
    images: ImageStore, copy: Copy, root: Path | None, place: Path, *, is_buildkit: bool
) -> Prepared:
    """Find the sources and read them for their digests.

    Args:
        root: the tree that they are in; None: there are no sources but here-documents.
        place: where they will be copied to.
    """
    if root is None:
        return Prepared(())
    work = new_work(images, place)
    directory = root

    def act() -> Prepared:
        found = find(directory, copy.sources, work, is_context=not copy.origin)
        if not is_buildkit and not copy.origin:  # there a file is named by what a link leads to
            found = [one._replace(path=one.resolved) for one in found]
        unpacked = frozenset(one.resolved for one in found if copy.is_add and _is_archive(one))
        return Prepared(tuple(found), unpacked)

    try:
        prepared = await in_thread(work, act)
    except InvalidArgument as error:
        raise InvalidArgument(f"{copy.keyword} failed: {error}") from error
    if not prepared.sources and not copy.documents:
        raise InvalidArgument(f"{copy.keyword} failed: no source files were specified")
    if len(prepared.sources) + len(copy.documents) > 1 and not copy.destination.endswith("/"):
        raise InvalidArgument(
            f"When using {copy.keyword} with more than one source file, the destination must be a directory and end"
            " with a /"
        )
    return prepared


async def perform(
    images: ImageStore, copy: Copy, prepared: Prepared, changes: Changes, working_dir: str
) -> None:
    """Copy into ``changes``.  Raises: InvalidArgument, ResourceExhausted, UnpackFailed."""
    place = destination_of(working_dir, copy.destination)
    work = new_work(images, changes.root.parent)
    unpacked = {}
    for number, source in enumerate(prepared.sources):
        if source.resolved in prepared.archives:
            directory = changes.root.parent / f"archive-{number}"
            directory.mkdir(mode=0o755)
            unpacked[source.resolved] = directory
            with Tree(source.root) as tree, tree.opened(source.resolved, os.O_RDONLY) as descriptor:
                await unpack(descriptor, directory, limits=images.limits, is_layer=True, has_whiteouts=False)
    await in_thread(work, lambda: _perform(copy, prepared, changes, place, unpacked, work))


def _perform(
    copy: Copy, prepared: Prepared, changes: Changes, place: str, unpacked: dict[str, Path], work: Work
) -> None:
    with changes.mounted() as root, Tree(root) as target:
        ownership = Ownership(owner=_owner(copy, root), mode=_mode(copy))
        copier = Copier(target, ownership, work)
        for source in prepared.sources:
            if source.resolved in unpacked:
                # An archive's files keep the owners that it gives them.
                archive = Source(unpacked[source.resolved], "", "", True, "")
                Copier(target, Ownership(), work).copy(archive, place)
            else:
                copier.copy(source, place)
        for document in copy.documents:
            copier.write(document.name, document.text.encode("utf-8", "surrogateescape"), place)


def _owner(copy: Copy, root: Path) -> Identity | None:
    """The owner of the files; None: as before, which is so for files of other images."""
    if not copy.chown:
        return None if copy.origin else Identity()
    user, colon, group = copy.chown.partition(":")
    if ":" in group:
        raise InvalidArgument(f"invalid chown string format: {copy.chown}")
    group = group if colon else user
    found = "unable to convert uid/gid chown string to host mapping: can't find "
    try:
        identity(root, user)
    except InvalidArgument as error:
        raise InvalidArgument(f"{found}uid for user {user}: no such user: {user}") from error
    try:
        return identity(root, f"{user}:{group}")
    except InvalidArgument as error:
        raise InvalidArgument(f"{found}gid for group {group}: no such group: {group}") from error


def _mode(copy: Copy) -> int | None:
    if not copy.chmod:
        return None
    if not re.fullmatch(r"[0-7]{1,5}", copy.chmod) or int(copy.chmod, 8) > 0o7777:
        raise InvalidArgument(
            f"invalid chmod parameter: '{copy.chmod}'. it should be octal string and between 0 and 07777"
        )
    return int(copy.chmod, 8)


def make_directory(changes: Changes, path: str, user: str = "") -> bool:
    """Create the working directory ``path`` if it is missing, and return whether it was.

    ``user``: Owner of new directories, as USER names it.  Root owns them if the image has no such user, as in BuildKit.
    """
    with changes.mounted() as root, Tree(root) as target:
        resolved = target.resolve(path)
        status = target.status(resolved)
        if status is not None:
            if not os.path.isdir(root / resolved):
                raise InvalidArgument(f"Cannot mkdir: {path} is not a directory")
            return False
        owner = _owner_of_directory(root, user)
        parts = resolved.split("/")
        for depth in range(1, len(parts) + 1):
            with target.opened("/".join(parts[: depth - 1])) as parent:
                try:
                    os.mkdir(parts[depth - 1], 0o755, dir_fd=parent)
                except FileExistsError:
                    continue
                os.chown(parts[depth - 1], owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)
                os.chmod(parts[depth - 1], 0o755, dir_fd=parent)
    return True


def _owner_of_directory(root: Path, user: str) -> Identity:
    """Source: buildkit, client/llb/fileop.go (WithUser), solver/llbsolver/ops/user_linux.go (readUser)."""
    name, colon, _group = user.partition(":")
    if not name:
        return Identity()
    try:
        return identity(root, f"{name}:{name}" if name.isdigit() and not colon else user)
    except InvalidArgument:
        return Identity()


def fill(root: Path, path: str, directory: Path, work: Work) -> None:
    """Copy what is below ``path`` of a tree into an empty directory, with its own owner and mode.

    Raises: InvalidArgument: it is no directory; ResourceExhausted; Stopped; OSError.
    """
    with Tree(root) as tree, Tree(directory) as target:
        inside = tree.resolve(path)
        status = tree.status(inside)
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise InvalidArgument(
                f"a cache mount cannot start with the files of {path}: it is not a directory"
            )
        Copier(target, Ownership(), work).copy_tree(tree, inside, "")
        os.fchown(target.descriptor, status.st_uid, status.st_gid)
        os.fchmod(target.descriptor, stat.S_IMODE(status.st_mode))


def make_not_newer(root: Path, time_ns: int) -> None:
    """Limit the modification times below ``root`` to ``time_ns``.  Blocks."""
    with Tree(root) as tree:
        _limit_time(tree.descriptor, ".", os.stat(tree.descriptor), time_ns)
        for path, status in walk(root):
            directory, name = os.path.split(path)
            with tree.opened(directory) as parent:
                _limit_time(parent, name, status, time_ns)


def _limit_time(parent: int, name: str, status: os.stat_result, time_ns: int) -> None:
    if status.st_mtime_ns > time_ns:
        os.utime(name, ns=(time_ns, time_ns), dir_fd=parent, follow_symlinks=False)


def _is_archive(source: Source) -> bool:
    """Whether a file is a tar, compressed or not: its first header is right."""
    if source.is_directory:
        return False
    head = b""
    with Tree(source.root) as tree:
        status = tree.status(source.resolved)
        if status is None or not stat.S_ISREG(status.st_mode):  # to open a device may do something
            return False
        try:
            with tree.opened(source.resolved, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
                for chunk in plain_chunks(os.fdopen(descriptor, "rb", closefd=False)):
                    head += chunk
                    if len(head) >= tarfile.BLOCKSIZE:
                        break
            tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        except (Malformed, tarfile.HeaderError, OSError, ValueError):
            return False
    return True


def shown_copy(copy: Copy, digest: str) -> str:
    """The step's line in the image's history."""
    chown = f"--chown={copy.chown} " if copy.chown else ""
    return f"{copy.keyword} {chown}{digest} in {copy.destination} "
