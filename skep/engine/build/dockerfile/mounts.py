"""Options of ``RUN --mount``.  Pure.

Source: buildkit, frontend/dockerfile/instructions/commands_runmount.go.
"""

import csv
import posixpath
from collections.abc import Callable, Sequence

import msgspec

from skep.api.formats.gosyntax import parse_size
from skep.engine.build.dockerfile.instructions import Expand
from skep.errors import InvalidArgument

_TYPES = ("bind", "cache", "tmpfs", "secret", "ssh")
_SHARINGS = ("shared", "private", "locked")
_TRUE, _FALSE = ("1", "t", "true"), ("0", "f", "false")


class RunMount(msgspec.Struct, frozen=True, kw_only=True):
    """One mount of a RUN step.  ``read_only``: None means the default of its type."""

    type: str = "bind"
    origin: str = ""
    """Value of ``from``: a stage or an image."""
    source: str = ""
    target: str = ""
    read_only: bool | None = None
    required: bool = False
    size_bytes: int = 0
    id: str = ""
    sharing: str = ""
    """Sharing of a cache.  Empty for ``shared``."""
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    env: str | None = None

    def target_below(self, working_dir: str) -> str:
        """Return the absolute target.  A relative one is below the step's working directory.

        Raises: InvalidArgument: it is the root.
        """
        target = posixpath.normpath(posixpath.join("/", working_dir, self.target))
        if target.strip("/") == "":
            raise InvalidArgument('invalid mount target "/"')
        return target

    @property
    def is_read_only(self) -> bool:
        """Whether the step may not write to it."""
        if self.read_only is not None:
            return self.read_only
        return self.type not in ("cache", "tmpfs")


def mount_origin(text: str) -> str:
    """Return the option ``from`` of a mount.  The other options may have variables.  Raises: InvalidArgument."""
    origin = ""
    for field in _fields(text):
        key, separator, value = field.partition("=")
        if key.strip().lower() == "from" and separator:
            _refuse_variables(value)
            origin = value
    return origin


def _fields(text: str) -> Sequence[str]:
    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise InvalidArgument(f"failed to parse csv mounts: {error}") from error


def _refuse_variables(origin: str) -> None:
    if "$" in origin[:-1]:
        raise InvalidArgument("'from' doesn't support variable expansion, define alias stage instead")


def parse_mount(text: str, expand: Expand) -> RunMount:
    """Return the mount that an option describes.  Raises: InvalidArgument, in BuildKit's words."""
    mount_origin(text)
    mount = RunMount()
    for field in _fields(text):
        key, separator, value = field.partition("=")
        key = key.strip().lower()
        mount = _with_option(mount, key, expand(value), field) if separator else _with_flag(mount, key, field)
    _check(mount)
    return mount


def _with_flag(mount: RunMount, key: str, field: str) -> RunMount:
    match key:
        case "readonly" | "ro":
            return msgspec.structs.replace(mount, read_only=True)
        case "readwrite" | "rw":
            return msgspec.structs.replace(mount, read_only=False)
        case "required" if mount.type in ("secret", "ssh"):
            return msgspec.structs.replace(mount, required=True)
        case "required":
            raise InvalidArgument(f"unexpected key '{key}' for mount type '{mount.type}'")
    raise InvalidArgument(f"invalid field '{field}' must be a key=value pair")


def _with_option(mount: RunMount, key: str, value: str, field: str) -> RunMount:
    replace = msgspec.structs.replace
    match key:
        case "type":
            if value.lower() not in _TYPES:
                raise InvalidArgument(f'unsupported mount type "{value}"')
            return replace(mount, type=value.lower())
        case "from":
            return replace(mount, origin=value)
        case "source" | "src":
            return replace(mount, source=value)
        case "target" | "dst" | "destination":
            return replace(mount, target=value)
        case "readonly" | "ro":
            return replace(mount, read_only=_boolean(key, value))
        case "readwrite" | "rw":
            return replace(mount, read_only=not _boolean(key, value))
        case "required" if mount.type in ("secret", "ssh"):
            return replace(mount, required=_boolean(key, value))
        case "size" if mount.type == "tmpfs":
            return replace(mount, size_bytes=_size(key, value))
        case "required" | "size":
            raise InvalidArgument(f"unexpected key '{key}' for mount type '{mount.type}'")
        case "id":
            return replace(mount, id=value)
        case "sharing":
            if value.lower() not in _SHARINGS:
                raise InvalidArgument(f'unsupported sharing value "{value}"')
            return replace(mount, sharing=value.lower())
        case "mode":
            return replace(mount, mode=_number(key, value, 8, 0o7777))
        case "uid":
            return replace(mount, uid=_number(key, value, 10, (1 << 31) - 1))
        case "gid":
            return replace(mount, gid=_number(key, value, 10, (1 << 31) - 1))
        case "env":
            return replace(mount, env=value)
    raise InvalidArgument(f"unexpected key '{key}' in '{field}'")


def _check(mount: RunMount) -> None:
    for name, value in (("mode", mount.mode), ("uid", mount.uid), ("gid", mount.gid)):
        if value is not None and mount.type not in ("secret", "ssh", "cache"):
            raise InvalidArgument(f'{name} not allowed for "{mount.type}" type mounts')
    match mount.type:
        case "secret":
            if mount.origin:
                raise InvalidArgument("secret mount should not have a from")
            if mount.sharing:
                raise InvalidArgument("secret mount should not define sharing")
            if not (mount.source or mount.target or mount.id):
                raise InvalidArgument("invalid secret mount. one of source, target required")
            if mount.source and mount.id:
                raise InvalidArgument("both source and id can't be set")
        case "ssh" if mount.source:
            raise InvalidArgument("ssh does not support source")
    if mount.sharing and mount.type != "cache":
        raise InvalidArgument(f"invalid cache sharing set for {mount.type} mount")


def _boolean(key: str, value: str) -> bool:
    if value.lower() not in (*_TRUE, *_FALSE):
        raise InvalidArgument(f"invalid value for {key}: {value}")
    return value.lower() in _TRUE


def _number(key: str, value: str, base: int, largest: int) -> int:
    digits: Callable[[str], bool] = str.isdigit
    try:
        number = int(value, base) if value.isascii() and digits(value) and len(value) < 12 else -1
    except ValueError:
        number = -1
    if not 0 <= number <= largest:
        raise InvalidArgument(f"invalid value {value} for {key}")
    return number


def _size(key: str, value: str) -> int:
    try:
        return parse_size(value)
    except InvalidArgument as error:
        raise InvalidArgument(f"invalid value for {key}: {value}") from error
