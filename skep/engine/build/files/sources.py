"""Sources of COPY and ADD: finds the files that they name, and computes digests.

The classic builder refuses ``..`` and follows no link before a wildcard.  BuildKit stops ``..`` at the root of the tree
and follows links up to the first wildcard.

Source: moby 20.10, builder/dockerfile/copy.go; buildkit, frontend/dockerfile/dockerfile2llb/convert_copy.go,
cache/contenthash/checksum.go; tonistiigi/fsutil, copy/copy.go.
"""

import errno
import hashlib
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from skep.engine.build.dockerfile.dockerfile import readable
from skep.engine.build.dockerfile.patterns import PathPatterns, Pattern, has_wildcards
from skep.engine.build.files.trees import Tree, Work
from skep.errors import InvalidArgument
from skep.linux.own_user_namespace import is_overlay_mark

CHUNK_BYTES = 1 << 20
"""Bytes hashed or copied at a time.  Files may be larger than memory."""
_XATTRS = ("user.", "security.capability")
_PIVOT = "/./"


class PatternSelection(NamedTuple):
    """Selection of files in a directory.  Without ``include``, all files.  Without ``exclude``, none is left out."""

    include: PathPatterns | None = None
    exclude: PathPatterns | None = None

    def takes(self, path: str) -> bool:
        """Return whether ``path``, relative to the directory, is copied."""
        if self.include is not None and not self.include.fits(path):
            return False
        return self.exclude is None or not self.exclude.fits(path)

    def enters(self, path: str) -> bool:
        """Return whether an entry below the directory ``path`` may be copied, even if the directory is not."""
        if self.exclude is not None and not self.exclude.has_exceptions and self.exclude.fits(path):
            return False
        return self.include is None or self.include.fits(path) or self.include.may_fit_below(path)


class CopySource(NamedTuple):
    """File or directory to copy: its ``path`` as named, and ``resolved`` without links."""

    root: Path
    path: str
    resolved: str
    is_directory: bool
    digest: str
    selection: PatternSelection | None = None


class CopySources(msgspec.Struct, frozen=True, kw_only=True):
    """Sources in BuildKit's language.

    ``parents``: Whether each name keeps its directories.  ``excludes``: Patterns of files to leave out.
    """

    names: tuple[str, ...]
    parents: bool = False
    excludes: tuple[str, ...] = ()


def find(root: Path, names: Sequence[str], work: Work, *, is_context: bool) -> list[CopySource]:
    """Return the sources of a COPY in their order, as the classic builder reads them.

    Raises: InvalidArgument: one does not exist, in Docker's words; ResourceExhausted; Stopped; OSError.
    """
    found = []
    with Tree(root) as tree:
        for name in names:
            below = name.removeprefix("/").removeprefix("./")
            paths = _matching(tree, below, work) if has_wildcards(below) else [below]
            found += [_classic_source(tree, path, work, is_context=is_context) for path in paths]
    return found


def find_wanted(root: Path, wanted: CopySources, work: Work) -> list[CopySource]:
    """Return the sources of a COPY in their order, as BuildKit reads them.

    Raises: InvalidArgument: one does not exist, in BuildKit's words; ResourceExhausted; Stopped; OSError.
    """
    exclude = PathPatterns(wanted.excludes) if wanted.excludes else None
    found = []
    with Tree(root) as tree:
        for name in wanted.names:
            if wanted.parents:
                found += _with_parents(tree, name, exclude, work)
                continue
            path = _normalized(name)
            paths = _matching(tree, path, work, follows=True) if has_wildcards(path) else [path]
            for one in paths:
                if (source := _source(tree, one, work, PatternSelection(exclude=exclude))) is not None:
                    found.append(source)
    return found


def _normalized(name: str) -> str:
    """Return ``name`` relative to the root of its tree, without ``..``."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _matching(tree: Tree, pattern: str, work: Work, *, follows: bool = False) -> list[str]:
    """Return the sorted paths that match a pattern.

    ``follows``: Whether links before the first wildcard are followed.  Other links are not.
    """
    parts = posixpath.normpath(pattern).split("/")
    found = [""]
    if follows:
        first = next(number for number, part in enumerate(parts) if has_wildcards(part))
        found, parts = [tree.resolve("/".join(parts[:first]))], parts[first:]
    for part in parts:
        matcher = Pattern(part)
        below = []
        for directory in found:
            try:
                names = tree.names(directory)
            except OSError as error:
                # Not a directory, or a link.
                if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
                    raise
                continue
            work.count(entries=len(names))
            below += [posixpath.join(directory, name) for name in names if matcher.matches(name)]
        found = below
    return found


def _classic_source(tree: Tree, path: str, work: Work, *, is_context: bool) -> CopySource:
    if posixpath.normpath(path).split("/")[0] == "..":
        raise InvalidArgument(f"forbidden path outside the build context: {readable(path)} ()")
    source = _source_at(tree, path, work, PatternSelection())
    if source is None:
        where = "file not found in build context or excluded by .dockerignore: " if is_context else ""
        raise InvalidArgument(f"{where}stat {readable(path)}: file does not exist")
    return source


def _source(tree: Tree, path: str, work: Work, selection: PatternSelection) -> CopySource | None:
    """Return the source at ``path``, or None if it is an excluded file.  Raises: InvalidArgument: it does not exist."""
    source = _source_at(tree, path, work, selection)
    if source is None:
        raise _not_found(path)
    exclude = selection.exclude
    if exclude is None or source.is_directory:
        return source
    return None if exclude.fits(path) or exclude.fits(posixpath.basename(path)) else source


def _not_found(path: str) -> InvalidArgument:
    return InvalidArgument(f'failed to compute cache key: "/{readable(path)}": not found')


def _with_parents(tree: Tree, name: str, exclude: PathPatterns | None, work: Work) -> list[CopySource]:
    """Return the directories that ``--parents`` copies from.  The copy keeps the part of each path after the pivot
    ``/./``.
    """
    base, pivot, rest = name.partition(_PIVOT)
    base, pattern = (_normalized(base), _normalized(rest)) if pivot else ("", _normalized(name))
    bases = _matching(tree, base, work, follows=True) if has_wildcards(base) else [base]
    selection = PatternSelection(PathPatterns([pattern]) if pattern else None, exclude)
    found = []
    for one in bases:
        source = _source_at(tree, one, work, selection)
        if source is not None and source.is_directory:
            found.append(source)
    is_plain = not has_wildcards(base) and not has_wildcards(pattern)
    if is_plain and not (found and _is_there(tree, posixpath.join(found[0].resolved, pattern))):
        raise _not_found(posixpath.join(base, pattern))
    return found


def _is_there(tree: Tree, path: str) -> bool:
    try:
        return tree.status(path) is not None
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link before the path's end is not entered
            raise
        return False


def _source_at(tree: Tree, path: str, work: Work, selection: PatternSelection) -> CopySource | None:
    """Return the source at ``path``, or None if it does not exist."""
    resolved = tree.resolve(path)
    status = tree.status(resolved)
    if status is None:
        return None
    if stat.S_ISDIR(status.st_mode):
        digest = f"dir:{_tree_digest(tree, resolved, work, selection)}"
        return CopySource(tree.root, path, resolved, True, digest, selection)
    hashed = hashlib.sha256(path.encode("utf-8", "surrogateescape"))
    _add_entry(hashed, tree, resolved, status, work)
    return CopySource(tree.root, path, resolved, False, f"file:{hashed.hexdigest()}")


def digest_of(digests: Sequence[str]) -> str:
    """Return the digest of all sources of a step for history and cache.  Empty without sources."""
    if len(digests) < 2:
        return "".join(digests)
    return f"multi:{hashlib.sha256(','.join(digests).encode()).hexdigest()}"


def _tree_digest(tree: Tree, top: str, work: Work, selection: PatternSelection) -> str:
    """Return the digest of all selected entries below ``top``, with their relative names."""
    total = hashlib.sha256()
    for path, status in entries(tree, top, work, selection):
        total.update(os.fsencode(path) + b"\0")
        _add_entry(total, tree, posixpath.join(top, path), status, work)
    return total.hexdigest()


def _add_entry(digest: "hashlib._Hash", tree: Tree, path: str, status: os.stat_result, work: Work) -> None:
    """Hash everything that a copy of the entry depends on, except its times."""
    mode = status.st_mode
    digest.update(f"{mode:o} {status.st_uid} {status.st_gid} {status.st_rdev}\0".encode())
    directory, name = posixpath.split(path)
    if stat.S_ISLNK(mode):
        with tree.opened(directory) as parent:
            digest.update(os.fsencode(os.readlink(name, dir_fd=parent)) + b"\0")
    elif stat.S_ISREG(mode):
        with tree.opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
            for key, value in attributes_of(descriptor):
                digest.update(key.encode() + b"=" + value + b"\0")
            content = hashlib.sha256()
            while data := os.read(descriptor, CHUNK_BYTES):
                content.update(data)
                work.count()
            digest.update(content.digest())


def entries(
    tree: Tree, top: str, work: Work, selection: PatternSelection | None = None
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and status of all selected entries below ``top``, each directory before its entries.

    A directory that is not selected is yielded if an entry in it is selected.
    """
    selection = selection or PatternSelection()
    waiting = dict[str, os.stat_result]()
    """Unselected directories that have no selected entry so far."""
    pending = [""]
    while pending:
        directory = pending.pop()
        below = []
        with tree.opened(posixpath.join(top, directory)) as descriptor:
            for name in sorted(os.listdir(descriptor)):
                path = posixpath.join(directory, name)
                is_taken = selection.takes(path)
                if not is_taken and not selection.enters(path):
                    continue
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                work.count(entries=1)
                if is_taken:
                    for above in _above(path) if waiting else ():
                        if above in waiting:
                            yield above, waiting.pop(above)
                    yield path, status
                elif stat.S_ISDIR(status.st_mode):
                    waiting[path] = status
                if stat.S_ISDIR(status.st_mode):
                    below.append(path)
        pending += below[::-1]


def _above(path: str) -> Iterator[str]:
    """Return the parent directories of ``path``, outermost first."""
    parts = path.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def attributes_of(descriptor: int) -> list[tuple[str, bytes]]:
    """Return the extended attributes that a copy keeps."""
    try:
        names = os.listxattr(descriptor)
    except OSError:
        return []  # the file system does not support them
    found = []
    for name in names:
        if name.startswith(_XATTRS) and not is_overlay_mark(name):
            with suppress(OSError):
                found.append((name, os.getxattr(descriptor, name)))
    return found
