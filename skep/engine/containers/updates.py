"""``docker update``: computes the changed configuration, which the life of a container applies without a restart."""

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from msgspec.structs import replace

from skep.engine.confinement import machine
from skep.engine.confinement.limits import nano_cpus_of, swap_bytes
from skep.engine.containers import create
from skep.engine.containers.container import Conflicting, Container, ContainerConfig, PlainOptions
from skep.engine.containers.request import DEVICE_LIMITS, UpdateRequest
from skep.errors import Unimplemented

Change: TypeAlias = Callable[[Container], Container]
"""Returns a container after an update.  Only limits and the restart policy may differ."""

_LIMITS: Final = (
    *("cpu_shares", "cpu_period", "cpu_quota", "cpuset_cpus", "cpuset_mems", "blkio_weight", "memory_swap"),
)


def updated(request: UpdateRequest, container: Container) -> Container:
    """Return ``container`` after ``docker update``.

    Raises: InvalidArgument: as at the container's creation; Conflicting; Unimplemented: a restart policy for a task's
    container.
    """
    create.check_limits(request)
    _refuse_conflicts(request, container)
    return replace(container, config=_config(request, container), plain=_plain(request, container))


def refuse_cleared(names: Iterable[str], container: Container) -> None:
    """Raise Unimplemented if an update clears limits of block devices that ``container`` has.

    Args:
        names: The limits to clear, by their names in requests in lower case.
    """
    for name in names:
        if getattr(container.config.machine, DEVICE_LIMITS[name]):
            raise Unimplemented(f"docker update cannot clear {name}: create the container again without it")


def _refuse_conflicts(request: UpdateRequest, container: Container) -> None:
    """Raise Conflicting for contradictions.  Source: moby, container/container_unix.go (UpdateContainer)."""
    config, plain = container.config, container.plain
    before = config.machine
    has_nano_cpus = config.nano_cpus > 0 and before.cpu_quota <= 0
    policy = request.restart_policy.name
    for is_conflict, what in (
        (
            request.nano_cpus > 0 and before.cpu_period > 0,
            "Conflicting options: Nano CPUs cannot be updated as CPU Period has already been set",
        ),
        (
            request.nano_cpus > 0 and before.cpu_quota > 0,
            "Conflicting options: Nano CPUs cannot be updated as CPU Quota has already been set",
        ),
        (
            request.cpu_period > 0 and has_nano_cpus,
            "Conflicting options: CPU Period cannot be updated as NanoCPUs has already been set",
        ),
        (
            request.cpu_quota > 0 and has_nano_cpus,
            "Conflicting options: CPU Quota cannot be updated as NanoCPUs has already been set",
        ),
        (
            request.memory and request.memory > swap_bytes(config) and not request.memory_swap,
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time",
        ),
        (
            plain is not None and plain.auto_remove and policy not in ("", "no"),
            "Restart policy cannot be updated because AutoRemove is enabled for the container",
        ),
    ):
        if is_conflict:
            raise Conflicting(f"Cannot update container {container.id}: {what}")


def _config(request: UpdateRequest, container: Container) -> ContainerConfig:
    config = container.config
    given = {name: value for name in _LIMITS if (value := getattr(request, name))}
    if request.memory and container.plain is not None:
        # The default swap limit (twice the memory limit) of a plain container stays when the memory limit is changed.
        # A task's limit changes when its service is updated.
        given.setdefault("memory_swap", swap_bytes(config))
    options = replace(config.machine, **given)
    memory_bytes = create.not_negative(request.memory, "memory limit") or config.memory_bytes
    reserved = create.not_negative(request.memory_reservation, "memory reservation")
    machine.check(options, memory_bytes)
    nano_cpus = create.not_negative(request.nano_cpus, "number of CPUs") or config.nano_cpus
    if request.cpu_quota or request.cpu_period:
        nano_cpus = max(nano_cpus_of(options.cpu_quota, options.cpu_period), 0)
    return replace(
        config,
        nano_cpus=nano_cpus,
        memory_bytes=memory_bytes,
        memory_reservation_bytes=reserved or config.memory_reservation_bytes,
        pids=config.pids if request.pids_limit is None else max(request.pids_limit, 0),
        machine=options,
    )


def _plain(request: UpdateRequest, container: Container) -> PlainOptions | None:
    if not request.restart_policy.name:
        return container.plain
    restart = create.restart_policy(request)
    if container.plain is not None:
        return replace(container.plain, restart=restart)
    if restart.name != "no":
        raise Unimplemented(
            "The container of a task is restarted by its service: use docker service update --restart-condition."
        )
    return None
