"""Resolves options by which containers share namespaces, mounts or a host name.

In all functions, ``get`` returns a container by id or name.

Source, including the error texts: moby 20.10, daemon/container_operations_unix.go (getIpcContainer, getPidContainer),
daemon/volumes.go.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from skep.engine.confinement import selinux
from skep.engine.confinement.machine import CONTAINER, other_container
from skep.engine.containers import create
from skep.engine.containers.container import Container, ContainerConfig, MountPoint, NotRunning
from skep.engine.containers.request import CreateRequest
from skep.engine.runtime.runtime_spec import Shared
from skep.errors import InvalidArgument, NotFound
from skep.model.container import Mount
from skep.model.values.ids import ContainerId

Get: TypeAlias = Callable[[str], Container]


def joined(request: CreateRequest, own_name: str, get: Get) -> CreateRequest:
    """Return ``request`` with container ids instead of names, and with the labels of shared namespaces.

    Raises: InvalidArgument.
    """
    return with_label_options(with_ids(request, own_name, get), get)


def with_ids(request: CreateRequest, own_name: str, get: Get) -> CreateRequest:
    """Replace container names in ``request`` by ids.

    Raises: InvalidArgument: no such container.  (A NotFound would make the docker command pull the image.)
    """
    host, ids = request.host_config, {}
    for field in ("network_mode", "pid_mode", "ipc_mode"):
        if name := other_container(getattr(host, field)):
            if name == own_name and field == "network_mode":
                raise InvalidArgument("cannot join own network")
            ids[field] = f"{CONTAINER}{_existing(name, get).id}"
    if not ids:
        return request
    return msgspec.structs.replace(request, host_config=msgspec.structs.replace(host, **ids))


def with_label_options(request: CreateRequest, get: Get) -> CreateRequest:
    """Add the SELinux options of a container that shares namespaces with the machine or with another container.

    Raises: InvalidArgument: no such container, or two with different labels.

    Source: moby, daemon/create.go (generateSecurityOpt).
    """
    host = request.host_config
    if any(option.split("=")[0] == "label" for option in host.security_opt):
        return request
    others = [name for mode in (host.pid_mode, host.ipc_mode) if (name := other_container(mode))]
    found = [selinux.options_from(_existing(name, get).config.process_label) for name in others]
    if host.privileged or "host" in (host.ipc_mode, host.pid_mode):
        chosen: tuple[str, ...] = (selinux.DISABLE,)
    elif not found or not all(found):
        return request
    elif len(set(found)) > 1:
        raise InvalidArgument("--ipc and --pid containers SELinux labels aren't the same")
    else:
        chosen = found[0]
    options = (*host.security_opt, *(f"label={option}" for option in chosen))
    return msgspec.structs.replace(request, host_config=msgspec.structs.replace(host, security_opt=options))


def _existing(name: str, get: Get) -> Container:
    """Return a container.  Raises: InvalidArgument: it does not exist."""
    try:
        return get(name)
    except NotFound as error:
        raise InvalidArgument(str(error)) from error


def with_hostname(config: ContainerConfig, network_mode: str, get: Get) -> ContainerConfig:
    """Return ``config`` with the host name of the container whose network it shares."""
    name = other_container(network_mode)
    return msgspec.structs.replace(config, hostname=get(name).config.hostname) if name else config


def inherited_mounts(specs: Sequence[str], own: Iterable[Mount], get: Get) -> tuple[MountPoint, ...]:
    """Return the mounts that ``--volumes-from`` adds, except at targets of the container's ``own`` mounts.

    Raises: InvalidArgument.
    """
    found: dict[str, MountPoint] = {}
    taken = {mount.target for mount in own}
    for text in specs:
        name, is_read_only = create.volumes_from(text)
        for point in _existing(name, get).config.mounts:
            if not point.internal and point.destination not in taken:
                read_only = point.read_only or is_read_only
                found[point.destination] = msgspec.structs.replace(point, read_only=read_only)
    return tuple(found.values())


def shared_by(container: Container, get: Get, shm: Callable[[ContainerId], Path]) -> Shared:
    """Return the resources of other containers that a starting container shares.

    ``shm`` returns the node's path of a container's /dev/shm.  Raises: NotFound; NotRunning; InvalidArgument.
    """
    machine = container.config.machine
    path, namespaces = "", {}
    for mode, type, refusal in (
        (container.network_mode, "network", "cannot join network of a non running container: {id}"),
        (machine.pid_mode, "pid", "container {id} is not running"),
        (machine.ipc_mode, "ipc", "can't join IPC of container {id}: container {id} is not running"),
    ):
        name = other_container(mode)
        if not name:
            continue
        other = get(name)
        if not other.is_active:
            raise NotRunning(refusal.format(id=other.id))
        other.require_running()
        namespaces[type] = f"/proc/{other.pid}/ns/{'net' if type == 'network' else type}"
        if container.users is not None:
            if other.users != container.users:
                raise InvalidArgument(
                    f"cannot join the {type} namespace of container {other.id}, whose users are not mapped as this "
                    "container's: run both with --userns host, or both without it"
                )
            # Only the root of its user namespace may join it.  Source: moby, daemon/oci_linux.go (WithNamespaces).
            namespaces["user"] = f"/proc/{other.pid}/ns/user"
        if type == "ipc":
            path = _shm_of(other, get, shm)
    return Shared(namespaces=namespaces, shm=path)


def _shm_of(other: Container, get: Get, shm: Callable[[ContainerId], Path]) -> str:
    """Return the path of a container's /dev/shm.

    Raises: NotFound; InvalidArgument: the container does not share it.
    """
    mode = other.config.machine.ipc_mode
    if mode == "host":
        return "/dev/shm"
    if name := other_container(mode):
        return _shm_of(get(name), get, shm)
    if mode != "shareable":
        raise InvalidArgument(
            f"can't join IPC of container {other.id}: non-shareable IPC"
            " (hint: use IpcMode:shareable for the donor container)"
        )
    return str(shm(other.id))
