"""Validates log drivers and their options when a container is created.  Pure.

Docker refuses unknown options when a container is created, and invalid values when it starts.  Here, both are refused
at the creation, with Docker's messages.

Source: moby 20.10, daemon/logger/factory.go (ValidateLogOpts), daemon/logger/*/ (ValidateLogOpt), daemon/logs.go
(mergeAndVerifyLogConfig).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from skep.api.formats.gosyntax import BOOLEANS, parse_size
from skep.engine.containers.container import LogConfig
from skep.errors import InvalidArgument
from skep.model.values.meta import Driver

JOURNAL = Path("/run/systemd/journal/socket")
"""Socket of the journal.  Source: systemd-journald.service(8)."""
COMMON = frozenset({"labels", "labels-regex", "env", "env-regex", "tag"})
FILES = frozenset({"max-size", "max-file", "compress"})
CACHE_PREFIX = "cache-"
EVERYWHERE = frozenset(
    {
        "mode",
        "max-buffer-size",
        f"{CACHE_PREFIX}disabled",
        *(CACHE_PREFIX + name for name in (*FILES, *COMMON)),
    }
)
"""Options of every driver."""
LOCAL_BYTES_MAX, LOCAL_FILES_MAX = 20 << 20, 5
"""Size and number of log files of the driver local, and of the local cache that other drivers use."""
BUFFER_BYTES, BUFFER_BYTES_MAX = 1 << 20, 64 << 20
"""Default and largest size in bytes of the buffer for ``mode=non-blocking``.

Limited, because one process has the buffers of all containers.
"""

Options = Mapping[str, str]
Check = Callable[[Options], None]

FILE_DRIVERS = ("json-file", "local")


def log_config(driver: Driver, checks: Mapping[str, Check]) -> LogConfig:
    """Return how a container is logged.

    Args:
        checks: The drivers of this node that send output to a remote, each with the function that checks its options.

    Raises: InvalidArgument: the driver does not exist here, or an option is invalid.
    """
    name, options = driver.name or "json-file", driver.options
    if name == "none":
        return LogConfig(type="none", options=options, is_readable=False)
    _check_everywhere(options)
    own = {key: value for key, value in options.items() if key not in EVERYWHERE}
    if name in FILE_DRIVERS:
        for key in own:
            if key not in FILES | COMMON:
                which = "json-file log driver" if name == "json-file" else "log driver local"
                raise InvalidArgument(f"unknown log opt '{key}' for {which}")
        return _json_file(options) if name == "json-file" else _local("local", options, options)
    check = checks.get(name)
    if check is None:
        raise InvalidArgument(f"logger: no log driver named '{name}' is registered")
    check(own)
    _check_buffer(options)
    cache = {
        key.removeprefix(CACHE_PREFIX): value
        for key, value in options.items()
        if key.startswith(CACHE_PREFIX)
    }
    return _local(name, options, cache, is_readable=not boolean(cache, "disabled"))


def with_defaults(given: Driver, default: Driver) -> Driver:
    """Return ``given`` with the node's default options added.

    Options of a driver are added only if the driver is the same.
    """
    if not given.name:
        given = Driver(name=default.name, options=given.options)
    added = {
        key: value
        for key, value in default.options.items()
        if given.name == default.name or (key.startswith(CACHE_PREFIX) and given.name != "none")
    }
    return Driver(name=given.name, options={**added, **given.options})


def refuse_unknown(name: str, options: Options, known: frozenset[str]) -> None:
    """Raise InvalidArgument for an option that the driver ``name`` does not have."""
    for key in options:
        if key not in known | COMMON:
            raise InvalidArgument(f"unknown log opt '{key}' for {name} log driver")


def boolean(options: Options, key: str, *, default: bool = False) -> bool:
    """Return a boolean option.  Raises: InvalidArgument, in the words of Go's parser."""
    text = options.get(key, "")
    if not text:
        return default
    value = BOOLEANS.get(text)
    if value is None:
        raise InvalidArgument(f'strconv.ParseBool: parsing "{text}": invalid syntax')
    return value


def integer(options: Options, key: str, default: int) -> int:
    """Return an integer option.  Raises: InvalidArgument, in the words of Go's parser."""
    text = options.get(key)
    if text is None:
        return default
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise InvalidArgument(f'strconv.Atoi: parsing "{text}": invalid syntax')
    return int(text)


def buffer_bytes(options: Options) -> int:
    """Return the buffer's size for ``mode=non-blocking``, or 0 to buffer lines only in the files."""
    if options.get("mode") != "non-blocking":
        return 0
    if "max-buffer-size" not in options:
        return BUFFER_BYTES
    return min(parse_size(options["max-buffer-size"]), BUFFER_BYTES_MAX)


def _check_buffer(options: Options) -> None:
    size = options.get("max-buffer-size")
    if size is not None and parse_size(size) > BUFFER_BYTES_MAX:
        raise InvalidArgument(
            f"logger: max-buffer-size {size} is larger than {BUFFER_BYTES_MAX >> 20}m, the maximum"
        )


def _check_everywhere(options: Options) -> None:
    mode = options.get("mode", "")
    if mode not in ("", "blocking", "non-blocking"):
        raise InvalidArgument(f"logger: logging mode not supported: {mode}")
    if "max-buffer-size" in options:
        if mode != "non-blocking":
            raise InvalidArgument("logger: max-buffer-size option is only supported with 'mode=non-blocking'")
        try:
            parse_size(options["max-buffer-size"])
        except InvalidArgument as error:
            raise InvalidArgument(f"error parsing option max-buffer-size: {error}") from error
    disabled = options.get(f"{CACHE_PREFIX}disabled", "")
    if disabled and disabled not in BOOLEANS:
        raise InvalidArgument(f"invalid value for option cache-disabled: {disabled}")


def _json_file(options: Options) -> LogConfig:
    size = options.get("max-size", "-1")
    max_size_bytes = 0 if size == "-1" else parse_size(size)
    if size != "-1" and not max_size_bytes:
        raise InvalidArgument("max-size must be a positive number")
    max_files = integer(options, "max-file", 1)
    if max_files < 1:
        raise InvalidArgument("max-file cannot be less than 1")
    compress = boolean(options, "compress")
    if compress and (max_files == 1 or not max_size_bytes):
        raise InvalidArgument("compress cannot be true when max-file is less than 2 or max-size is not set")
    return LogConfig(
        type="json-file",
        options=options,
        max_size_bytes=max_size_bytes,
        max_files=max_files,
        compress=compress,
    )


def _local(name: str, options: Options, files: Options, *, is_readable: bool = True) -> LogConfig:
    """Return a log configuration with the files of the driver local.

    ``files`` has the options for these files, which may come from another driver's cache options.
    """
    max_files = integer(files, "max-file", LOCAL_FILES_MAX)
    if max_files < 0:
        raise InvalidArgument("max-file must not be negative")
    size = files.get("max-size")
    max_size_bytes = {None: LOCAL_BYTES_MAX, "-1": 0}.get(size)
    if max_size_bytes is None:
        max_size_bytes = parse_size(size or "")
    compress = boolean(files, "compress", default=True)
    if compress and max_files <= 1:
        raise InvalidArgument("compression cannot be enabled when max file count is 1")
    return LogConfig(
        type=name,
        options=options,
        max_size_bytes=max_size_bytes,
        max_files=max(max_files, 1),
        compress=compress,
        is_readable=is_readable,
    )
