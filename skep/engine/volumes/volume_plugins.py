"""Docker volume plug-ins: programs that provide volumes over HTTP on a Unix or TCP socket.

A plug-in is trusted with its own volumes and nothing else.  Each call has a deadline and a size limit, a plug-in that
does not respond is skipped for a while, and its responses are validated.

Source: moby 20.10, pkg/plugins/{discovery,client,plugins}.go, volume/drivers/{proxy,adapter,extpoint}.go.
"""

import asyncio
import json
import os
import ssl
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, SystemClock, tick
from skep.aio.failures import describe_error, log_error
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable

SOCKETS: Final = Path("/run/docker/plugins")
SPECS: Final = (Path("/etc/docker/plugins"), Path("/usr/lib/docker/plugins"))
LOCAL: Final = "local"
SCAN_S = 10.0
"""Seconds between two scans for new plug-ins."""
RESPONSE_BYTES_MAX = 1 << 20
"""Limit in bytes for a response, and for a certificate file."""
CALLS_MAX = 16
"""Limit for concurrent calls to one plug-in.  Further calls wait, up to their time limit, before they are sent."""
PLUGINS_MAX = 64
"""Limit for the plug-ins of one node.  Further ones are ignored."""
VOLUMES_MAX = 10_000
"""Limit for the listed volumes of one plug-in.  Further ones are left out."""
_SPEC_BYTES_MAX = 64 * 1024
"""Limit in bytes for reading a spec file."""
_PATH_CHARACTERS_MAX = 4096
"""Limit in characters for a path (the kernel's limit), and for a plug-in's error text."""
_ACCEPT = "application/vnd.docker.plugins.v1.2+json"

log = structlog.get_logger()

T = TypeVar("T")


class PluginRefused(SkepError):
    """The plug-in answered with an error.  The message is the plug-in's."""


class _Response(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """A plug-in's response.  Unknown fields are ignored."""


class _Activated(_Response, frozen=True):
    implements: tuple[str, ...] | None = None


class _Done(_Response, frozen=True):
    err: str = ""


class _Mounted(_Response, frozen=True):
    err: str = ""
    mountpoint: str = ""


class PluginVolume(_Response, frozen=True):
    """A volume as its plug-in describes it."""

    name: str = ""
    mountpoint: str = ""
    created_at: str = ""
    status: Mapping[str, Any] | None = None


class _Got(_Response, frozen=True):
    err: str = ""
    volume: PluginVolume | None = None


class _Listed(_Response, frozen=True):
    err: str = ""
    volumes: tuple[PluginVolume, ...] | None = None


class _Scope(_Response, frozen=True):
    scope: str = ""


class _Capable(_Response, frozen=True):
    err: str = ""
    capabilities: _Scope | None = None


class _Tls(_Response, frozen=True):
    insecure_skip_verify: bool = False
    ca_file: str = msgspec.field(default="", name="CAFile")
    cert_file: str = ""
    key_file: str = ""


class PluginEndpoint(_Response, frozen=True):
    """Address of a plug-in from its spec file: ``unix:///path``, ``tcp://host:port``, ``http://...``."""

    addr: str = ""
    tls_config: _Tls | None = msgspec.field(default=None, name="TLSConfig")


class PluginTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Time limits of a plug-in's calls, in seconds."""

    change_s: float = 120.0
    """For calls that change or mount volumes, as in Docker."""
    read_s: float = 60.0
    """For calls that only read, as in Docker."""
    list_s: float = 5.0
    """For each plug-in when all volumes are listed, so that a slow plug-in does not hold up the list."""


TIMES = PluginTimes()


class VolumePlugin:
    """A volume plug-in.  Every call raises PluginRefused, with the plug-in's message, or Unavailable."""

    def __init__(self, name: str, endpoint: PluginEndpoint, clock: Clock, times: PluginTimes = TIMES) -> None:
        self.name = name
        self._times = times
        self.endpoint = endpoint
        self.gives_volumes = False
        """Whether the plug-in has declared itself a volume driver."""
        self.scope = LOCAL
        """``global`` if every node that has this plug-in sees the same volumes, otherwise ``local``."""
        self._clock = clock
        self.calls = asyncio.Semaphore(CALLS_MAX)
        self._backoff = Backoff(1.0, 30.0)
        self.silent_until = 0.0

    async def activate(self) -> None:
        """Perform the handshake.  Raises: NotFound: the plug-in is not a volume driver."""
        response = await self._call("Plugin.Activate", None, _Activated, self._times.read_s)
        if "VolumeDriver" not in (response.implements or ()):
            raise NotFound(f'plugin "{self.name}" does not implement VolumeDriver')
        with suppress(PluginRefused):  # older plug-ins do not have the call
            capable = await self._call("VolumeDriver.Capabilities", {}, _Capable, self._times.read_s)
            is_global = capable.capabilities is not None and capable.capabilities.scope.lower() == "global"
            self.scope = "global" if is_global else LOCAL
        self.gives_volumes = True

    async def create(self, name: str, options: Mapping[str, str]) -> None:
        """Create a volume."""
        _checked(
            await self._call(
                "VolumeDriver.Create", {"Name": name, "Opts": dict(options)}, _Done, self._times.change_s
            )
        )

    async def remove(self, name: str) -> None:
        """Remove a volume."""
        _checked(await self._call("VolumeDriver.Remove", {"Name": name}, _Done, self._times.change_s))

    async def mount(self, name: str, id: str) -> str:
        """Mount a volume for the user ``id`` and return its directory on this node.  Idempotent."""
        response = await self._call(
            "VolumeDriver.Mount", {"Name": name, "ID": id}, _Mounted, self._times.change_s
        )
        _checked(response)
        return checked_path(self.name, response.mountpoint)

    async def unmount(self, name: str, id: str) -> None:
        """Tell the plug-in that the user ``id`` no longer needs the volume."""
        _checked(
            await self._call("VolumeDriver.Unmount", {"Name": name, "ID": id}, _Done, self._times.change_s)
        )

    async def get(self, name: str) -> PluginVolume | None:
        """Return a volume, or None if it does not exist or the plug-in refuses the call."""
        try:
            response = await self._call("VolumeDriver.Get", {"Name": name}, _Got, self._times.read_s)
            _checked(response)
        except PluginRefused:
            return None  # the protocol has no distinct error for "no such volume"
        return response.volume if response.volume is not None and response.volume.name == name else None

    async def list(self) -> Sequence[PluginVolume]:
        """Return all volumes of the plug-in, but at most ``VOLUMES_MAX``."""
        response = await self._call("VolumeDriver.List", {}, _Listed, self._times.list_s)
        _checked(response)
        return (response.volumes or ())[:VOLUMES_MAX]

    async def _call(self, method: str, body: Any, type: type[T], deadline_s: float) -> T:
        left_s = self.silent_until - self._clock.monotonic()
        if left_s > 0:
            raise Unavailable(f"plugin {self.name} does not respond; next attempt in {left_s:.0f} s")
        await self._take_place(method, deadline_s)
        try:
            async with asyncio.timeout(deadline_s):
                status, response = await self._post(method, body)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self.silent_until = self._clock.monotonic() + self._backoff.next_delay_s()
            reason = (
                f"no response within {deadline_s:g} s"
                if isinstance(error, TimeoutError)
                else describe_error(error)
            )
            raise Unavailable(f"{method}: plugin {self.name}: {reason}") from error
        finally:
            self.calls.release()
        self._backoff.reset()
        if len(response) > RESPONSE_BYTES_MAX:
            raise Unavailable(
                f"{method}: plugin {self.name}: its response is larger than {RESPONSE_BYTES_MAX} bytes"
            )
        if status != 200:
            raise PluginRefused(f"{method}: {_refusal(response)}")
        try:
            return msgspec.json.decode(response, type=type)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unavailable(
                f"{method}: plugin {self.name}: its response cannot be read: {error}"
            ) from error

    async def _take_place(self, method: str, deadline_s: float) -> None:
        """Wait for a free call slot.

        Raises: Unavailable: other calls hold all slots.  This does not mean that the plug-in does not respond.
        """
        try:
            async with asyncio.timeout(deadline_s):
                await self.calls.acquire()
        except TimeoutError as error:
            raise Unavailable(
                f"{method}: plugin {self.name}: {CALLS_MAX} other calls did not end within {deadline_s:g} s"
            ) from error

    async def _post(self, method: str, body: Any) -> tuple[int, bytes]:
        url, context = await asyncio.to_thread(_address, self.endpoint)
        async with (
            aiohttp.ClientSession(connector=_connector(self.endpoint, context)) as session,
            session.post(
                f"{url}/{method}",
                data=b"" if body is None else json.dumps(body).encode(),
                headers={"Accept": _ACCEPT, "Content-Type": _ACCEPT},
                allow_redirects=False,
            ) as response,
        ):
            pieces, size = [], 0
            async for piece in response.content.iter_chunked(64 * 1024):
                pieces.append(piece)
                size += len(piece)
                if size > RESPONSE_BYTES_MAX:
                    break
            return response.status, b"".join(pieces)


def _checked(response: _Done | _Mounted | _Got | _Listed) -> None:
    if response.err:
        raise PluginRefused(response.err[:_PATH_CHARACTERS_MAX])


def _refusal(response: bytes) -> str:
    """Return the text of an error response: the field ``Err``, else the whole body."""
    try:
        text = msgspec.json.decode(response, type=_Done).err
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = ""
    return (text or response.decode(errors="replace"))[:_PATH_CHARACTERS_MAX]


def checked_path(plugin: str, path: str) -> str:
    """Return the directory that a plug-in named.  Raises: Unavailable: it is not a normalized absolute path."""
    if not path:
        raise Unavailable(f"plugin {plugin} returned no path for the volume")
    is_plain = path.startswith("/") and os.path.normpath(path) == path and "\0" not in path
    if not is_plain or len(path) > _PATH_CHARACTERS_MAX:
        raise Unavailable(f"plugin {plugin} returned an invalid volume path: {path[:200]!r}")
    return path


def _address(endpoint: PluginEndpoint) -> tuple[str, ssl.SSLContext | None]:
    """Return the base URL and the TLS context of a plug-in.  Blocks, so call it in a thread.

    Raises: OSError: a certificate file cannot be read.
    """
    url, tls = urlsplit(endpoint.addr), endpoint.tls_config
    if url.scheme == "unix":
        return "http://plugin", None
    if tls is None:
        return f"http://{url.netloc}", None
    for path in filter(None, (tls.ca_file, tls.cert_file, tls.key_file)):
        _check_certificate(Path(path))
    context = ssl.create_default_context(cafile=tls.ca_file or None)
    if tls.insecure_skip_verify or not tls.ca_file:  # as in Docker, nothing is verified without a CA
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return f"https://{url.netloc}", context


def _check_certificate(path: Path) -> None:
    """Raise OSError for a pipe or device, because reading it could block, and for a file that is too large for a
    certificate.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > RESPONSE_BYTES_MAX:
        raise OSError(f"{path} is not a regular file of at most {RESPONSE_BYTES_MAX} bytes")


def _connector(endpoint: PluginEndpoint, context: ssl.SSLContext | None) -> "aiohttp.BaseConnector":
    url = urlsplit(endpoint.addr)
    if url.scheme == "unix":
        return aiohttp.UnixConnector(url.path, force_close=True)
    return aiohttp.TCPConnector(ssl=context if context is not None else True, force_close=True)


class VolumePlugins:
    """The node's volume plug-ins, discovered by their sockets and spec files."""

    def __init__(
        self,
        sockets: Path = SOCKETS,
        specs: Sequence[Path] = SPECS,
        clock: Clock | None = None,
        on_change: Callable[[], None] = lambda: None,
        times: PluginTimes = TIMES,
    ) -> None:
        """``on_change`` is called when the set of drivers changes."""
        self._sockets = sockets
        self._specs = specs
        self._clock = clock or SystemClock()
        self._on_change = on_change
        self._times = times
        self._plugins: dict[str, VolumePlugin] = {}
        self._lock = asyncio.Lock()
        self._is_unread = False

    @property
    def drivers(self) -> Sequence[str]:
        """Sorted names of the plug-ins that are volume drivers."""
        return sorted(name for name, plugin in self._plugins.items() if plugin.gives_volumes)

    async def run(self) -> None:
        """Discover plug-ins until cancelled."""
        while True:
            await self.scan()
            await tick(self._clock, SCAN_S)

    async def scan(self) -> None:
        """Activate new plug-ins, and forget plug-ins whose socket or file is gone."""
        before = self.drivers
        unread: list[OSError] = []
        found = await asyncio.to_thread(self._names, unread.append)
        if unread:  # known plug-ins may still exist
            self._report(unread[0])
        else:
            for name in set(self._plugins) - set(found):
                del self._plugins[name]
        self._is_unread = bool(unread)
        async with asyncio.TaskGroup() as group:
            for name in found:
                group.create_task(self._try(name), name=f"plugin-{name[:32]}")
        if self.drivers != before:
            self._on_change()

    def _report(self, error: OSError) -> None:
        if not self._is_unread:
            log.warning("plugin discovery incomplete", reason=describe_error(error))

    async def _try(self, name: str) -> None:
        plugin = self._plugins.get(name)
        if plugin is not None and plugin.gives_volumes:
            return
        try:
            async with asyncio.timeout(self._times.list_s):
                await self.get(name)
        except NotFound:
            return  # a network or log plug-in
        except (SkepError, TimeoutError):
            return  # retried at the next scan, or after a growing delay
        except Exception as error:  # one plug-in's error must not affect others
            log_error(error, "plugin not activated", plugin=name)

    async def get(self, name: str) -> VolumePlugin:
        """Return a plug-in by name, and activate it if needed.

        Raises: NotFound, in Docker's words; PluginRefused; Unavailable.
        """
        try:
            endpoint = await asyncio.to_thread(self._endpoint, name)
        except OSError as error:
            raise Unavailable(f"error looking up volume plugin {name}: {describe_error(error)}") from error
        if endpoint is None:
            raise NotFound(f'error looking up volume plugin {name}: plugin "{name}" not found')
        plugin = self._plugins.get(name)
        if plugin is None or plugin.endpoint != endpoint:
            plugin = self._plugins[name] = VolumePlugin(name, endpoint, self._clock, self._times)
        if not plugin.gives_volumes:
            try:
                await plugin.activate()
            except NotFound as error:
                raise NotFound(f"error looking up volume plugin {name}: {error}") from error
        return plugin

    def known(self, name: str) -> VolumePlugin | None:
        """Return a plug-in that has been activated, or None."""
        plugin = self._plugins.get(name)
        return plugin if plugin is not None and plugin.gives_volumes else None

    def _names(self, failed: Callable[[OSError], None]) -> list[str]:
        """Return the names of all kinds of plug-ins, from their sockets and spec files.

        Args:
            failed: Called with the error of each file or directory that cannot be read at the moment.
        """
        found = set()
        for path in _entries(self._sockets, failed):
            try:
                if path.suffix == ".sock" and _is_socket(path):
                    found.add(path.stem)
            except OSError as error:
                failed(error)
        for directory in self._specs:
            found |= {path.stem for path in _entries(directory, failed) if path.suffix in (".spec", ".json")}
        return sorted(found)[:PLUGINS_MAX]

    def _endpoint(self, name: str) -> PluginEndpoint | None:
        """Return the address of a plug-in, or None if no such plug-in exists.

        Raises: InvalidArgument: its spec file is invalid; OSError.
        """
        if not name or "/" in name or name.startswith("."):
            return None
        for path in (self._sockets / f"{name}.sock", self._sockets / name / f"{name}.sock"):
            if _is_socket(path):
                return PluginEndpoint(addr=f"unix://{path}")
        for directory in self._specs:
            for suffix in (".spec", ".json"):
                for path in (directory / f"{name}{suffix}", directory / name / f"{name}{suffix}"):
                    if path.is_file():
                        return _read_endpoint(name, path)
        return None


def _read_endpoint(name: str, path: Path) -> PluginEndpoint:
    """Read a plug-in's spec file.  Raises: InvalidArgument; OSError."""
    try:
        with path.open("rb") as file:
            content = file.read(_SPEC_BYTES_MAX)
        if path.suffix == ".json":
            endpoint = msgspec.json.decode(content, type=PluginEndpoint)
        else:
            endpoint = PluginEndpoint(addr=content.decode().strip())
        scheme = urlsplit(endpoint.addr).scheme
    except (ValueError, msgspec.DecodeError) as error:
        raise InvalidArgument(f"plugin {name}: {path} cannot be read: {describe_error(error)}") from error
    if scheme not in ("unix", "tcp", "http", "https"):
        raise InvalidArgument(f"plugin {name}: {path}: Unknown protocol")
    return endpoint


def _entries(directory: Path, failed: Callable[[OSError], None]) -> Iterator[Path]:
    """Return the files of a directory and of its direct subdirectories."""

    def listed(one: Path) -> list[Path]:
        try:
            return list(one.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            failed(error)
            return []

    for path in listed(directory):
        try:
            is_directory = path.is_dir()
        except OSError as error:
            failed(error)
            continue
        yield from listed(path) if is_directory else (path,)


def _is_socket(path: Path) -> bool:
    """Return whether a path is a socket.  Raises: OSError."""
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
