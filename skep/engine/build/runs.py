"""RUN: a command in its own container, whose changes become a layer.

Source: moby 20.10, builder/dockerfile/dispatchers.go (dispatchRun), containerbackend.go; buildkit,
frontend/dockerfile/dockerfile2llb/convert.go (dispatchRun), convert_runmount.go, convert_ssh.go.
"""

import asyncio
import errno
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from skep.aio.race import afterwards
from skep.engine.build.cache.cache import CacheKey, CacheMounts
from skep.engine.build.dockerfile.dockerfile import heredoc_of, quoted
from skep.engine.build.dockerfile.instructions import Run
from skep.engine.build.dockerfile.mounts import RunMount
from skep.engine.build.files import copies
from skep.engine.build.files.sources import find
from skep.engine.build.files.trees import Tree
from skep.engine.build.inputs import Inputs
from skep.engine.build.interface import BuildRequest, StepFailed
from skep.engine.build.stage import Changes, MountedTree, in_thread, mounted_image, new_work
from skep.engine.containers.container import Container, StandardStream
from skep.engine.containers.request import CreateRequest, HostConfig, LogOptions
from skep.engine.engine import Engine
from skep.engine.images.image import Image
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, NotFound, PermissionDenied, SkepError, Unimplemented
from skep.linux import mounting, syscalls
from skep.model.container import BindOptions, HealthConfig, Mount, TmpfsOptions
from skep.model.values.user_map import UserMap

MADE_BY_THE_RUNTIME = ("dev", "proc", "sys", "etc/hosts", "etc/hostname", "etc/resolv.conf")
"""Mount points that the runtime creates in every container if the image lacks them.  They are not part of a layer."""
_SECRETS_BYTES_MAX = 16 << 20
"""Memory for a step's secrets, each of at most 500 KiB (``SECRET_BYTES_MAX``)."""
_PIPES = "/dev/pipes/"

Output = Callable[[StandardStream, bytes], None]


class PreparedRun(msgspec.Struct, frozen=True, kw_only=True):
    """Command, environment and mounts of a RUN step's container."""

    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    secret_env: tuple[str, ...] = ()
    """Variables with secrets, which are never recorded."""
    mounts: tuple[Mount, ...] = ()
    network: str = ""


def command_of(run: Run, shell: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Return the command of a RUN step, and the content of the script at ``/dev/pipes/<name>``, if there is one.

    Raises: InvalidArgument: a here-document is not allowed here.
    """
    if not run.heredocs:
        return run.command.resolved(shell), ""
    if len(run.command.words) != 1 or not run.command.is_shell:
        raise InvalidArgument("parsing produced an invalid run command")
    text, first = run.command.words[0], run.heredocs[0]
    if heredoc_of(text) is None:
        for document in run.heredocs:
            text += f"\n{document.content}{document.name}"
        return (*shell, text), ""
    if first.content.startswith("#!"):
        return (f"{_PIPES}{first.name}",), first.text
    return (*shell, first.text), ""


class StepContainers:
    """Runs the commands of builds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def users(self) -> UserMap | None:
        """Mapping of the containers' users, or None."""
        return self._engine.bundles.users

    @asynccontextmanager
    async def create(
        self, image: Image, request: BuildRequest, prepared: PreparedRun
    ) -> AsyncIterator[Container]:
        """Provide a container for one command.  It is killed and removed at the end of the block."""
        name = f"build-{secrets.token_hex(6)}"
        async with afterwards(partial(self._discard, name)):
            wanted = _create_request(image, request, prepared)
            yield await self._engine.create(wanted, name=name, image=image, is_step=True)

    async def run(
        self, container: Container, prepared: PreparedRun, output: Output, *, is_buildkit: bool = False
    ) -> None:
        """Start the container, pass on its output, and return when it has ended.  Raises: StepFailed; SkepError."""
        async with asyncio.TaskGroup() as group:
            # The reader attaches before ``start`` collects the container's waiting readers.
            reading = group.create_task(
                self._forward_output(container, output), name="output of a build step"
            )
            error = None
            try:
                await self._engine.start(container.id, secret_env=prepared.secret_env)
            except SkepError as refused:  # a task group would wrap it
                error = refused
                reading.cancel()
        if error is not None:
            raise error
        ended = await self._engine.wait(container.id)
        if ended.exit_code:
            reason = "out of memory" if ended.oom_killed else ""
            raise StepFailed(prepared.command, ended.exit_code, reason, is_buildkit=is_buildkit)

    def missing_targets(self, container: Container, mounts: Sequence[Mount]) -> list[str]:
        """Return the mount targets and parent directories that the runtime will create, the deepest first.

        ``container``: Not started yet.  Blocks.
        """
        missing = set[str]()
        with Tree(self._engine.bundles.rootfs(container.id)) as tree:
            for mount in mounts:
                path = tree.resolve(mount.target)
                while path and tree.status(path) is None:
                    missing.add(path)
                    path = os.path.dirname(path)
        return sorted(missing, key=lambda path: path.count("/"), reverse=True)

    async def changes_of(self, container: Container, made: Sequence[str]) -> Path:
        """Unmount an ended container and return the directory with its changes.

        ``made``: Result of ``missing_targets``.  Targets that are empty are removed from the changes.
        """
        upper = self._engine.bundles.path(container.id) / "upper"
        await asyncio.to_thread(self._engine.bundles.release, container.id)
        await asyncio.to_thread(_remove_empty, upper, made)
        return upper

    async def _forward_output(self, container: Container, output: Output) -> None:
        try:
            attachment = await self._engine.attach(container.id)
        except SkepError:
            return  # the container was not started, for which ``start`` raises the reason
        try:
            while (piece := await attachment.read()) is not None:
                output(*piece)
        finally:
            attachment.close()

    async def _discard(self, name: str) -> None:
        with suppress(NotFound):
            await self._engine.remove(name, force=True, with_volumes=True)


def _remove_empty(root: Path, paths: Sequence[str]) -> None:
    """Remove the ``paths`` that are empty directories or files."""
    with Tree(root) as tree:
        for path in paths:
            directory, name = os.path.split(path)
            with suppress(OSError), tree.opened(directory) as parent:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    os.rmdir(name, dir_fd=parent)
                elif not status.st_size:
                    os.unlink(name, dir_fd=parent)


def _create_request(image: Image, request: BuildRequest, prepared: PreparedRun) -> CreateRequest:
    limits = request.limits
    network = prepared.network or request.network or "default"
    return CreateRequest(
        image=image.id,
        hostname=request.hostname
        if network != "host"
        else "",  # with the host's network the name is the machine's
        cmd=prepared.command,
        entrypoint=("",),
        env=prepared.env,
        healthcheck=HealthConfig(test=("NONE",)),
        host_config=HostConfig(
            network_mode=network,
            log_config=LogOptions(type="none"),
            memory=limits.memory_bytes,
            nano_cpus=limits.nano_cpus,
            shm_size=limits.shm_bytes,
            ulimits=limits.ulimits,
            extra_hosts=request.hosts,
            mounts=prepared.mounts,
        ),
    )


class _Base(msgspec.Struct, frozen=True):
    """Files of a mount.  ``tree``: Where they are.  ``digest``: Digest of the part that ``source`` selects."""

    tree: MountedTree
    digest: str


class Areas(NamedTuple):
    """Creates empty directories for mounts of steps, whose containers have the mapping ``users``."""

    create: Callable[[], Path]
    users: UserMap | None = None


class MountSources:
    """Prepares the mounts of one RUN step, for as long as the step runs."""

    def __init__(
        self,
        stack: AsyncExitStack,
        areas: Areas,
        caches: CacheMounts,
        namespace: str,
        inputs: Inputs,
        images: ImageStore,
        tree_of: Callable[[str], AbstractAsyncContextManager[MountedTree]],
    ) -> None:
        """Args:
        namespace: Namespace of the directories of ``--mount=type=cache``.
        tree_of: Mounts the file system of a context, a stage or an image.
        """
        self._stack = stack
        self._area, self._users = areas
        self._caches = caches
        self._namespace = namespace
        self._inputs = inputs
        self._images = images
        self._tree_of = tree_of
        self._bases: dict[int, _Base] = {}
        self._held: dict[CacheKey, Path] = {}
        """Directories of cache mounts.  Mounts of one step with the same key share theirs, as in BuildKit."""
        self._secrets: Path | None = None
        self._agents = 0

    async def find(self, mounts: Sequence[RunMount]) -> Sequence[str]:
        """Find the files of bind mounts and the initial files of caches, and return their digests.

        Raises: SkepError.
        """
        for mount in mounts:
            if mount.type != "bind" and not (mount.type == "cache" and mount.origin):
                continue
            if mount.origin:
                tree = await self._stack.enter_async_context(self._tree_of(mount.origin))
            else:
                tree = MountedTree(await self._inputs.context())
            work = new_work(self._images, self._images.scratch)
            act = partial(find, tree.root, (mount.source or "/",), work, is_context=not mount.origin)
            self._bases[id(mount)] = _Base(tree, (await in_thread(work, act))[0].digest)
        return [base.digest for base in self._bases.values()]

    async def prepare(
        self,
        command: tuple[str, ...],
        script: str,
        env: Mapping[str, str],
        mounts: Sequence[RunMount],
        working_dir: str,
    ) -> PreparedRun:
        """Return the command with its environment and mounts.

        Raises: InvalidArgument, NotFound: a mount's source does not exist.
        """
        variables, hidden, found = dict(env), dict[str, str](), list[Mount]()
        if script:
            path = self._file("script", script.encode("utf-8", "surrogateescape"), 0o755)
            found.append(Mount(type="bind", source=str(path), target=command[0], read_only=True))
        caches = [(self._key_of(one, working_dir), one) for one in mounts if one.type == "cache"]
        # In the same order in all steps, because two steps could otherwise wait for each other's locked directories.
        for key, mount in sorted(caches, key=lambda one: one[0].name):
            await self._hold(key, mount)
        for mount in mounts:
            match mount.type:
                case "bind":
                    found.append(await self._bind(mount, mount.target_below(working_dir)))
                case "cache":
                    found.append(self._cache(mount, working_dir))
                case "tmpfs":
                    options = TmpfsOptions(size_bytes=mount.size_bytes)
                    target = mount.target_below(working_dir)
                    found.append(Mount(type="tmpfs", target=target, tmpfs_options=options))
                case "secret":
                    found += await self._secret(mount, hidden)
                case "ssh":
                    found += await self._ssh(mount, variables)
        return PreparedRun(
            command=command,
            env=_pairs(variables),
            secret_env=_pairs(hidden),
            mounts=tuple(found),
        )

    async def _bind(self, mount: RunMount, target: str) -> Mount:
        root, layers = self._bases[id(mount)].tree
        # An overlay discards the step's writes.  With mapped users, an overlay's own mount cannot be mapped.
        if not mount.is_read_only or (self._users is not None and layers):
            changes = Changes(self._area(), layers or [root], users=self._users)
            work = new_work(self._images, self._images.scratch)
            root = await self._stack.enter_async_context(mounted_image(changes, work))
        source = self._bound(root, mount.source, f"failed to calculate checksum: {mount.source}: not found")
        return Mount(type="bind", source=str(source), target=target, read_only=mount.is_read_only)

    def _key_of(self, mount: RunMount, working_dir: str) -> CacheKey:
        base = self._bases.get(id(mount))
        return CacheKey(
            id=mount.id
            or (os.path.normpath(mount.target) if mount.target else mount.target_below(working_dir)),
            namespace=self._namespace,
            base=base.digest if base is not None else "",
            mode=mount.mode,
            uid=mount.uid,
            gid=mount.gid,
        )

    async def _hold(self, key: CacheKey, mount: RunMount) -> None:
        """Hold the directory of a cache until the step ends."""
        if key in self._held:
            return
        base = self._bases.get(id(mount))
        fill = partial(self._fill, base.tree.root, mount.source) if base is not None else None
        self._held[key] = await self._stack.enter_async_context(
            self._caches.hold(key, mount.sharing or "shared", fill)
        )

    def _cache(self, mount: RunMount, working_dir: str) -> Mount:
        """Mount a cache.  ``source`` is a path in ``from``, or in the cache without ``from``."""
        key = self._key_of(mount, working_dir)
        directory = self._held[key]
        if id(mount) not in self._bases and mount.source:
            directory = self._bound(directory, mount.source, f"the cache {key.id} has no {mount.source}")
        target = mount.target_below(working_dir)
        return Mount(type="bind", source=str(directory), target=target, read_only=mount.is_read_only)

    def _bound(self, root: Path, path: str, missing: str) -> Path:
        """Bind ``path`` in the tree ``root`` to a place that steps cannot change, and return that place.

        The runtime follows links in the source of a mount.  Without this, another step with the same cache could
        replace the path by a link to the host's files after it was checked (CVE-2024-23651).

        Raises: NotFound: with the message ``missing``; InvalidArgument: there are too many links.
        """
        try:
            descriptor = syscalls.open_in_root(root, path.lstrip("/") or ".", os.O_PATH)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(missing) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise InvalidArgument(f"too many links in {path}") from error
            raise
        place = self._area() / "part"
        try:
            mounting.bind_opened(descriptor, place)
        finally:
            os.close(descriptor)
        self._stack.callback(syscalls.unmount, place)
        return place

    async def _fill(self, root: Path, path: str, directory: Path) -> None:
        work = new_work(self._images, directory)
        await in_thread(work, partial(copies.fill, root, path, directory, work))

    async def _secret(self, mount: RunMount, variables: dict[str, str]) -> list[Mount]:
        id = mount.id or mount.source or os.path.basename(mount.target)
        provider = self._inputs.provider
        value = await provider.secret(id) if provider is not None else None
        if value is None:
            if mount.required:
                raise NotFound(f"secret {id}: not found")
            if mount.env is not None:  # BuildKit sets the variable, without a value
                variables[mount.env or id] = ""
            return []
        if mount.env is not None:
            variables[mount.env or id] = value.decode("utf-8", "surrogateescape")
            if not mount.target:
                return []
        mode = 0o400 if mount.mode is None else mount.mode
        path = self._file(f"secret-{secrets.token_hex(4)}", value, mode)
        os.chown(path, *self._owner(mount))
        target = os.path.join("/", mount.target or f"run/secrets/{os.path.basename(id)}")
        return [Mount(type="bind", source=str(path), target=target, read_only=True)]

    async def _ssh(self, mount: RunMount, variables: dict[str, str]) -> list[Mount]:
        id = mount.id or "default"
        socket = None
        if self._inputs.provider is not None:
            socket = await self._stack.enter_async_context(self._inputs.provider.ssh(id))
        if socket is None and mount.required:
            raise NotFound(f"ssh agent {id}: not found")
        target = os.path.join("/", mount.target or f"run/buildkit/ssh_agent.{self._agents}")
        if not self._agents:
            variables["SSH_AUTH_SOCK"] = target
        self._agents += 1
        if socket is None:  # BuildKit sets the variable nevertheless
            return []
        os.chown(socket, *self._owner(mount))
        os.chmod(socket, 0o600 if mount.mode is None else mount.mode)
        return [Mount(type="bind", source=str(socket), target=target, bind_options=BindOptions())]

    def _owner(self, mount: RunMount | None = None) -> tuple[int, int]:
        """Return the machine's user and group that own a file for the step, by default its root."""
        uid, gid = (mount.uid or 0, mount.gid or 0) if mount is not None else (0, 0)
        return (uid, gid) if self._users is None else (self._users.uid(uid), self._users.gid(gid))

    def _file(self, name: str, content: bytes, mode: int) -> Path:
        """Create a file in memory, which is removed when the step has ended."""
        if self._secrets is None:
            self._secrets = self._area()
            options = f"size={_SECRETS_BYTES_MAX},mode=0700"
            syscalls.mount("tmpfs", self._secrets, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, options)
            self._stack.callback(syscalls.unmount_if_mounted, self._secrets)
        path = self._secrets / name
        path.write_bytes(content)
        path.chmod(mode)
        os.chown(path, *self._owner())
        return path


def _pairs(variables: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}={value}" for name, value in variables.items())


def network_of(run: Run, *, has_host_network: bool) -> str:
    """Return the network of a step.  Empty for the build's network.

    ``has_host_network``: Whether the build has the entitlement ``network.host``.

    Raises: InvalidArgument, Unimplemented, PermissionDenied: the build cannot provide the requested options.
    """
    if run.devices:
        raise Unimplemented(f"RUN --device is not supported: {run.devices[0]}")
    if run.security not in ("", "sandbox", "insecure"):
        raise InvalidArgument(f"security {quoted(run.security)} is not valid")
    if run.security == "insecure":
        raise PermissionDenied("security.insecure is not allowed: build steps are never privileged")
    match run.network:
        case "" | "default":
            return ""
        case "none":
            return "none"
        case "host" if has_host_network:
            return "host"
        case "host":
            raise PermissionDenied("network.host is not allowed")
    raise InvalidArgument(f"invalid network mode {quoted(run.network)}")
