"""Files that COPY, ADD and WORKDIR put into an image.

Source: moby 20.10, builder/dockerfile/dispatchers.go, copy.go, internals_linux.go; buildkit,
frontend/dockerfile/dockerfile2llb/convert_copy.go, solver/llbsolver/file/backend.go, unpack.go.
"""

import os
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from skep.engine.build.dockerfile.instructions import Copy
from skep.engine.build.dockerfile.modes import Mode, parse_mode
from skep.engine.build.files.copying import Copier, Ownership, destination_of
from skep.engine.build.files.remotes import is_git, is_remote
from skep.engine.build.files.sources import CopySource, CopySources, find, find_wanted
from skep.engine.build.files.trees import Tree, Work
from skep.engine.build.stage import Changes, in_thread, new_work
from skep.engine.confinement.users import ProcessUser, identity
from skep.engine.images.archives.streams import MalformedArchive, plain_chunks
from skep.engine.images.archives.workers import unpack
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument
from skep.linux.trees import walk

NEEDS_BUILDKIT = (
    "the --{} option requires BuildKit. Refer to https://docs.docker.com/go/buildkit/ to learn how to build images"
    " with BuildKit enabled"
)
_CLASSIC_FLAGS = ("from", "chown")


class PreparedCopy(msgspec.Struct, frozen=True):
    """Sources of a COPY, and the indexes of archives that ADD unpacks."""

    sources: tuple[CopySource, ...]
    archives: frozenset[int] = frozenset()


def check_copy(copy: Copy, *, is_buildkit: bool) -> None:
    """Check options and sources.  Raises: InvalidArgument: one is not valid, in Docker's words."""
    for name in copy.flags:
        if name not in _CLASSIC_FLAGS and not is_buildkit:
            raise InvalidArgument(NEEDS_BUILDKIT.format(name))
    if "$" in copy.origin:
        raise InvalidArgument(
            "variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope"
            " as a workaround"
        )
    if copy.chmod:
        parse_mode(copy.chmod)
    if copy.checksum and len(copy.sources) + len(copy.documents) != 1:
        raise InvalidArgument("checksum can't be specified for multiple sources")
    if copy.checksum and not all(map(is_remote, copy.sources)):
        raise InvalidArgument("checksum requires HTTP(S) or Git sources")
    for source in () if copy.is_add else copy.sources:
        if is_git(source):
            raise InvalidArgument("source can't be a git ref for COPY")
        if is_remote(source):
            prefix = "" if is_buildkit else "COPY failed: "
            raise InvalidArgument(f"{prefix}source can't be a URL for COPY")


def local_sources(copy: Copy) -> tuple[str, ...]:
    """Return the sources that are in the context, a stage or an image."""
    return tuple(name for name in copy.sources if not (copy.is_add and is_remote(name)))


async def prepare(
    images: ImageStore,
    copy: Copy,
    root: Path | None,
    place: Path,
    remote: Mapping[str, CopySource],
    *,
    is_buildkit: bool,
) -> PreparedCopy:
    """Find the sources and compute their digests.

    Args:
        root: Tree with the local sources.  None if there are none.
        place: Destination of the copy.
        remote: Fetched sources by name.
    """
    work = new_work(images, place)

    def act() -> PreparedCopy:
        found: list[CopySource] = []
        unpacked: list[bool] = []
        for name in copy.sources:
            if name in remote:
                found.append(remote[name])
                unpacked.append(bool(copy.unpack) and is_archive(remote[name]))
                continue
            assert root is not None, "a local source has a tree"
            local = _found(copy, root, name, work, is_buildkit=is_buildkit)
            found += local
            unpacked += [copy.is_add and copy.unpack is not False and is_archive(one) for one in local]
        return PreparedCopy(
            tuple(found), frozenset(number for number, is_one in enumerate(unpacked) if is_one)
        )

    try:
        prepared = await in_thread(work, act)
    except InvalidArgument as error:
        if is_buildkit:
            raise
        raise InvalidArgument(f"{copy.keyword} failed: {error}") from error
    if not is_buildkit:
        _check_classic(copy, prepared)
    return prepared


def _found(copy: Copy, root: Path, name: str, work: Work, *, is_buildkit: bool) -> list[CopySource]:
    if is_buildkit:
        parents = "parents" in copy.flags
        return find_wanted(root, CopySources(names=(name,), parents=parents, excludes=copy.excludes), work)
    found = find(root, (name,), work, is_context=not copy.origin)
    if copy.origin:
        return found
    return [one._replace(path=one.resolved) for one in found]  # a copied link gets the name of its target


def _check_classic(copy: Copy, prepared: PreparedCopy) -> None:
    """Refuse copies that the classic builder refuses: several sources to a file, or none.  BuildKit allows both.

    Raises: InvalidArgument.
    """
    count = len(prepared.sources) + len(copy.documents)
    if not count:
        raise InvalidArgument(f"{copy.keyword} failed: no source files were specified")
    if count > 1 and not copy.destination.endswith("/"):
        raise InvalidArgument(
            f"When using {copy.keyword} with more than one source file, the destination must be a directory and end"
            " with a /"
        )


class CopyTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Destination of a COPY.

    ``changes``: The step's own changes.  ``users``: File system with the users that ``--chown`` names.  ``place``:
    Absolute destination.
    """

    changes: Changes
    users: Changes
    place: str
    is_buildkit: bool


def target_of(copy: Copy, working_dir: str, changes: Changes, area: Path, *, is_buildkit: bool) -> CopyTarget:
    """Return the destination of a COPY: in ``changes``, or with ``--link`` in a layer independent of those below.

    ``area``: An empty directory for such a layer.
    """
    is_linked = "link" in copy.flags and not copy.chmod  # as in BuildKit
    return CopyTarget(
        changes=Changes(area, (), is_detached=True) if is_linked else changes,
        users=changes,
        place=destination_of(working_dir, copy.destination),
        is_buildkit=is_buildkit,
    )


async def perform(images: ImageStore, copy: Copy, prepared: PreparedCopy, target: CopyTarget) -> None:
    """Copy into ``target``.  Raises: InvalidArgument, ResourceExhausted, UnpackFailed."""
    area = target.changes.root.parent
    work = new_work(images, area)
    unpacked = {}
    for number, source in enumerate(prepared.sources):
        if number in prepared.archives:
            directory = area / f"archive-{number}"
            directory.mkdir(mode=0o755)
            unpacked[number] = directory
            with Tree(source.root) as tree, tree.opened(source.resolved, os.O_RDONLY) as descriptor:
                await unpack(descriptor, directory, limits=images.limits, is_layer=True, has_whiteouts=False)
    await in_thread(work, lambda: _perform(copy, prepared, target, unpacked, work))


def _perform(
    copy: Copy, prepared: PreparedCopy, target: CopyTarget, unpacked: dict[int, Path], work: Work
) -> None:
    if target.users is target.changes:
        with target.changes.mounted() as root:
            owner = _owner(copy, root, is_buildkit=target.is_buildkit)
            _copy_all(copy, prepared, target, root, owner, unpacked, work)
        return
    owner = None if copy.origin else ProcessUser()
    if copy.chown:
        with target.users.mounted() as root:
            owner = _owner(copy, root, is_buildkit=target.is_buildkit)
    with target.changes.mounted() as root:
        _copy_all(copy, prepared, target, root, owner, unpacked, work)


def _copy_all(
    copy: Copy,
    prepared: PreparedCopy,
    target: CopyTarget,
    root: Path,
    owner: ProcessUser | None,
    unpacked: dict[int, Path],
    work: Work,
) -> None:
    mode: Mode | None = parse_mode(copy.chmod) if copy.chmod else None
    # Files of an archive keep the archive's owners.  In BuildKit, --chown overrides them.
    archived = Ownership(owner=owner if target.is_buildkit and copy.chown else None)
    with Tree(root) as tree:
        copier = Copier(tree, Ownership(owner=owner, mode=mode), work, replaces=not target.is_buildkit)
        for number, source in enumerate(prepared.sources):
            if number in unpacked:
                archive = CopySource(unpacked[number], "", "", True, "")
                Copier(tree, archived, work).copy(archive, target.place)
            else:
                copier.copy(source, target.place)
        for document in copy.documents:
            copier.write(document.name, document.text.encode("utf-8", "surrogateescape"), target.place)


def _owner(copy: Copy, root: Path, *, is_buildkit: bool) -> ProcessUser | None:
    """Return the owner of the files.  None keeps the owners of files of other images."""
    if not copy.chown:
        return None if copy.origin else ProcessUser()
    user, colon, group = copy.chown.partition(":")
    if ":" in group:
        raise InvalidArgument(f"invalid chown string format: {copy.chown}")
    found = "unable to convert uid/gid chown string to host mapping: can't find "
    try:
        named = _user(root, user)
    except InvalidArgument as error:
        raise InvalidArgument(f"{found}uid for user {user}: no such user: {user}") from error
    if not colon and is_buildkit:
        return named
    group = group if colon else user
    try:
        return identity(root, f"{user}:{group}")
    except InvalidArgument as error:
        raise InvalidArgument(f"{found}gid for group {group}: no such group: {group}") from error


def _user(root: Path, user: str) -> ProcessUser:
    """Return a user with its group.  A number without a passwd entry is also the group, as in BuildKit."""
    found = identity(root, user)
    return ProcessUser(uid=found.uid, gid=found.uid if user.isdigit() else found.gid)


def make_directory(changes: Changes, path: str, user: str = "") -> bool:
    """Create the working directory ``path`` if it is missing, and return whether it was.

    ``user``: Owner of new directories, as USER names it.  Root owns them if the image has no such user, as in BuildKit.
    """
    with changes.mounted() as root, Tree(root) as target:
        resolved = target.resolve(path)
        status = target.status(resolved)
        if status is not None:
            if not stat.S_ISDIR(status.st_mode):
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


def _owner_of_directory(root: Path, user: str) -> ProcessUser:
    """Return the owner of a new working directory.  Root owns it if the image has no such user.

    Source: buildkit, client/llb/fileop.go (WithUser), solver/llbsolver/ops/user_linux.go (readUser).
    """
    name, colon, _group = user.partition(":")
    if not name:
        return ProcessUser()
    try:
        return identity(root, f"{name}:{name}" if name.isdigit() and not colon else user)
    except InvalidArgument:
        return ProcessUser()


def fill(root: Path, path: str, directory: Path, work: Work) -> None:
    """Copy the content of a tree's directory ``path`` into an empty directory, with owner and mode of ``path``.

    Raises: InvalidArgument: it is not a directory; ResourceExhausted; Stopped; OSError.
    """
    with Tree(root) as tree, Tree(directory) as target:
        inside = tree.resolve(path)
        status = tree.status(inside)
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise InvalidArgument(f"a cache mount cannot be filled from {path}: it is not a directory")
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


def is_archive(source: CopySource) -> bool:
    """Return whether a file is a tar, compressed or not, by its first header."""
    if source.is_directory:
        return False
    head = b""
    with Tree(source.root) as tree:
        status = tree.status(source.resolved)
        if status is None or not stat.S_ISREG(status.st_mode):  # opening a device may have side effects
            return False
        try:
            with tree.opened(source.resolved, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
                for chunk in plain_chunks(os.fdopen(descriptor, "rb", closefd=False)):
                    head += chunk
                    if len(head) >= tarfile.BLOCKSIZE:
                        break
            tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        except (MalformedArchive, tarfile.HeaderError, OSError, ValueError):
            return False
    return True


def shown_copy(copy: Copy, digest: str) -> str:
    """Return the step's line in the image's history."""
    chown = f"--chown={copy.chown} " if copy.chown else ""
    return f"{copy.keyword} {chown}{digest} in {copy.destination} "


def key_of_options(copy: Copy) -> tuple[str, ...]:
    """Return the options that change the result of a COPY, without sources, destination and owner.

    All are empty for a plain COPY.
    """
    documents = "".join(f"{one.name}\0{one.text}\0" for one in copy.documents)
    switches = [name for name in ("link", "parents", "keep-git-dir") if name in copy.flags]
    unpack = "" if copy.unpack is None else f"unpack={copy.unpack}"
    return (copy.chmod, documents, *switches, *(f"exclude={one}" for one in copy.excludes), unpack)
