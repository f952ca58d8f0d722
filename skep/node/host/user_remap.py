"""Resolves the option ``userns-remap`` to a mapping of ids.

Source, including the texts: moby 20.10, daemon/daemon_unix.go (parseRemappedRoot, setupRemappedRoot),
pkg/idtools/idtools.go.  Docker creates the user ``dockremap`` itself.  Here the refusal has the commands that create
it, because a node changes no users of its machine.
"""

import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from skep.errors import FailedPrecondition, InvalidArgument
from skep.linux import user_namespaces
from skep.model.values.user_map import UserMap, mapping_of

DEFAULT: Final = "default"
_DEFAULT_USER: Final = "dockremap"
_RANGE: Final = 65536
"""Subordinate ids of a user.  Source: shadow, SUB_UID_COUNT; images use ids below this number."""
FIRST_ID: Final = 100_000
"""The first subordinate id.  Source: shadow, SUB_UID_MIN."""
_RANGES_MAX: Final = 340
"""The most ranges of one namespace.  Source: linux/user_namespace.h, UID_GID_MAP_MAX_EXTENTS."""
_NEXT_STEP: Final = "correct userns-remap, or remove it"


class Accounts(msgspec.Struct, frozen=True, kw_only=True):
    """The users and groups of a machine, from its files."""

    users: Mapping[str, int]
    groups: Mapping[str, int]
    subuid: str
    subgid: str


def read_accounts(etc: Path = Path("/etc")) -> Accounts:
    """Read the machine's files.  A missing file has no entries.  Raises: OSError."""

    def text(name: str) -> str:
        try:
            return (etc / name).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    return Accounts(
        users=_ids(text("passwd")), groups=_ids(text("group")), subuid=text("subuid"), subgid=text("subgid")
    )


def resolve(option: str, accounts: Accounts) -> UserMap | None:
    """Return the mapping that ``option`` selects, or None if it selects root, which maps nothing.

    Raises: InvalidArgument: there is no such user or group; FailedPrecondition: the user has no subordinate ids.
    """
    words = option.split(":")
    if len(words) > 2 or not all(words):
        raise InvalidArgument(f'Invalid user/group specification in --userns-remap: "{option}"')
    user = _user(words[0], accounts)
    _check_group(words, user, accounts)
    if user == "root":
        return None
    uids = subordinate_ranges(accounts.subuid, user, accounts.users.get(user))
    gids = subordinate_ranges(accounts.subgid, user, accounts.users.get(user))
    for kind, ranges, text in (("uid", uids, accounts.subuid), ("gid", gids, accounts.subgid)):
        if not ranges:
            start = free_range(text)
            raise FailedPrecondition(
                f"no sub{kind} ranges found for user {user!r}: "
                f"usermod --add-sub{kind}s {start}-{start + _RANGE - 1} {user}"
            )
        if len(ranges) > _RANGES_MAX:
            raise FailedPrecondition(
                f"user {user!r} has {len(ranges)} sub{kind} ranges, and Linux maps {_RANGES_MAX}: "
                f"remove some from /etc/sub{kind}"
            )
    return UserMap(uids=mapping_of(uids), gids=mapping_of(gids))


def load(
    option: str,
    directories: Iterable[Path],
    run: Path,
    read: Callable[[], Accounts] = read_accounts,
    problem: Callable[[Path], str] = user_namespaces.mapping_problem,
) -> UserMap | None:
    """Return the mapping of a node whose files are in ``directories``.  Empty ``option``: None.  Blocks.

    ``run`` is the node's run directory, through which containers reach their root file systems.

    Raises: InvalidArgument; FailedPrecondition: this machine cannot map the owners of files.
    """
    if not option:
        return None
    try:
        users = resolve(option, read())
    except OSError as error:
        raise FailedPrecondition(
            f"userns-remap: {error.filename}: {error.strerror}: make it readable"
        ) from error
    if users is None:
        return None
    for parent in (run, *run.parents):
        if not _lets_in(parent, *users.root):
            raise FailedPrecondition(
                f"a directory above the run directory ({parent}) restricts access to the remapped root uid/gid: "
                f"chmod o+x {parent}, or name another one with --run-dir"
            )
    tried = set[int]()
    for directory in directories:
        device = next(one.stat().st_dev for one in (directory, *directory.parents) if one.exists())
        if device in tried:
            continue
        tried.add(device)
        if reason := problem(directory):
            raise FailedPrecondition(
                f"userns-remap needs id-mapped mounts (Linux 5.19; ext4, xfs or btrfs), and {directory} has none "
                f"({reason}): move it with --data-dir, or remove userns-remap"
            )
    return users


def _lets_in(directory: Path, uid: int, gid: int) -> bool:
    """Return whether a user may pass a directory.  Source: moby, daemon/daemon_unix.go (canAccess)."""
    try:
        status = directory.stat()
    except FileNotFoundError:  # the node creates it
        return True
    allowed = status.st_mode & stat.S_IXOTH
    allowed |= status.st_mode & stat.S_IXUSR if status.st_uid == uid else 0
    allowed |= status.st_mode & stat.S_IXGRP if status.st_gid == gid else 0
    return bool(allowed)


def free_range(text: str) -> int:
    """Return the start of the first free range after all ranges in a file of subordinate ids."""
    ends = [start + count for _, start, count in _entries(text)]
    return max([FIRST_ID, *(end for end in ends if end < 2**31)])


def _user(word: str, accounts: Accounts) -> str:
    """Return the name of the user that owns the ranges."""
    if word.isascii() and word.isdigit():
        name = next((name for name, uid in accounts.users.items() if uid == int(word)), None)
        if name is None:
            raise InvalidArgument(f"Uid {word} has no entry in /etc/passwd: {_NEXT_STEP}")
        return name
    name = _DEFAULT_USER if word == DEFAULT else word
    if name in accounts.users:
        return name
    if word != DEFAULT:
        raise InvalidArgument(f'Error during uid lookup for "{name}": no such user: {_NEXT_STEP}')
    start = max(free_range(accounts.subuid), free_range(accounts.subgid))
    ids = f"{start}-{start + _RANGE - 1}"
    raise FailedPrecondition(
        f"userns-remap=default needs the user {name}: "
        f"useradd --system --user-group --no-create-home --shell /bin/false {name} && "
        f"usermod --add-subuids {ids} --add-subgids {ids} {name}"
    )


def _check_group(words: list[str], user: str, accounts: Accounts) -> None:
    """Raise InvalidArgument if the group does not exist.  Without one, it is the group of the user's name or id."""
    word = words[-1] if len(words) == 2 or words[0].isdigit() else user
    if word.isascii() and word.isdigit():
        if int(word) not in accounts.groups.values():
            raise InvalidArgument(f"Gid {word} has no entry in /etc/group: {_NEXT_STEP}")
    elif word not in accounts.groups:
        raise InvalidArgument(f'Error during gid lookup for "{word}": no such group: {_NEXT_STEP}')


def _ids(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in text.splitlines():
        words = line.split(":")
        if len(words) >= 3 and words[2].isascii() and words[2].isdigit():
            found.setdefault(words[0], int(words[2]))
    return found


def subordinate_ranges(text: str, user: str, uid: int | None) -> list[tuple[int, int]]:
    """Return start and length of a user's ranges in a file of subordinate ids, where users have names or numbers."""
    return [(start, count) for name, start, count in _entries(text) if name == user or name == str(uid)]


def _entries(text: str) -> Iterable[tuple[str, int, int]]:
    for line in text.splitlines():
        name, *numbers = line.strip().split(":")
        if len(numbers) == 2 and all(one.isascii() and one.isdigit() for one in numbers) and int(numbers[1]):
            yield name, int(numbers[0]), int(numbers[1])
