"""Events in the life of a container: requests, reports of effects, and failures."""

from collections.abc import Callable

import msgspec

from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    Health,
    Interruption,
    ProcessName,
    RestartPolicy,
)
from skep.engine.events import NamedNetwork
from skep.model.networks.sandbox import EndpointRequest, NetworkMode, Sandbox
from skep.model.values.times import Timestamp


class LifeEvent(msgspec.Struct, frozen=True):
    """Something that was requested, was observed, or follows an effect."""


# --- requests -----------------------------------------------------------------------------------------------------


class Create(LifeEvent, frozen=True):
    """Prepare a new container."""


class UserStarts(LifeEvent, frozen=True):
    """The user starts a plain container.  Recorded at once, although the start may wait for other operations."""


class UserStops(LifeEvent, frozen=True):
    """The user stops a plain container."""


class Start(LifeEvent, frozen=True):
    """Start the command."""

    secret_env: tuple[str, ...] = ()
    """Variables of this run, which no record contains."""
    by_policy: bool = False
    """Whether the restart policy starts it."""
    ignore_stop: bool = False
    """Whether the restart policy starts it even if the user has stopped it."""


class Signal(LifeEvent, frozen=True):
    """Send a signal to the first process."""

    number: int


class Pause(LifeEvent, frozen=True):
    """Freeze the run of ``process``."""

    process: ProcessName | None


class Unpause(LifeEvent, frozen=True):
    """Thaw the run of ``process``."""

    process: ProcessName | None


class Exec(LifeEvent, frozen=True):
    """Run an additional process.  ``word`` is the user's name for the container."""

    word: str


class Update(LifeEvent, frozen=True):
    """Change limits and the restart policy to the result of ``change``, which raises the error of a refused change."""

    change: Callable[[Container], Container]


class Connect(LifeEvent, frozen=True):
    """Connect a plain container to another network, now or at its start."""

    request: EndpointRequest


class Disconnect(LifeEvent, frozen=True):
    """Disconnect a plain container from a network."""

    network: str
    """The network as the user wrote it."""
    network_id: str = ""
    """The network's id, or None if unknown."""


class Rename(LifeEvent, frozen=True):
    """Rename a plain container, also on its networks."""

    name: str


class Retire(LifeEvent, frozen=True):
    """Free all resources that only a run needs, because the task's container will never run."""


class RemoveContainer(LifeEvent, frozen=True):
    """Remove the container, ``force`` even if it runs."""

    force: bool = False


class Adopted(LifeEvent, frozen=True):
    """A new node process has read the record and examined what exists."""

    at: Timestamp
    has_run: bool = False
    """Whether the recorded process was started, even if it has ended."""
    is_frozen: bool = False
    has_network: bool = False
    """Whether its sandbox is usable."""
    has_leftovers: bool = False
    """Whether an interrupted start or exit may have left resources behind."""
    health: Health | None = None
    """Initial health of a run."""


# --- reports ------------------------------------------------------------------------------------------------------


class DirectoriesMade(LifeEvent, frozen=True):
    """The directories exist."""


class Attached(LifeEvent, frozen=True):
    """The networks are attached."""

    sandbox: Sandbox


class BundleWritten(LifeEvent, frozen=True):
    """The bundle is written."""

    warnings: tuple[str, ...]


class ProcessCreated(LifeEvent, frozen=True):
    """The first process exists and waits."""

    process: ProcessName
    monitor: ProcessName


class Started(LifeEvent, frozen=True):
    """The first process executes the command."""

    at: Timestamp
    health: Health | None
    by_policy: bool = False


class Attempted(LifeEvent, frozen=True):
    """A start has succeeded or failed."""

    by_policy: bool = False


class Frozen(LifeEvent, frozen=True):
    """The run of ``process`` is frozen."""

    process: ProcessName | None


class Thawed(LifeEvent, frozen=True):
    """The run of ``process`` continues."""

    process: ProcessName | None


class Probed(LifeEvent, frozen=True):
    """The run of ``process`` was probed and has this health."""

    process: ProcessName | None
    health: Health


class Updated(LifeEvent, frozen=True):
    """Limits apply to the processes."""

    config: ContainerConfig
    restart: RestartPolicy | None
    """Restart policy, or None for a task's container."""
    warnings: tuple[str, ...]


class NetworksChanged(LifeEvent, frozen=True, kw_only=True):
    """A run was connected to a network or disconnected from it."""

    sandbox: Sandbox
    mode: NetworkMode
    networks: tuple[EndpointRequest, ...]
    mac_address: str
    action: str
    """Docker's event: connect or disconnect."""
    network: NamedNetwork


class RunEnded(LifeEvent, frozen=True, kw_only=True):
    """The first process has ended."""

    at: Timestamp
    exit_code: int
    oom_killed: bool = False
    error: str = ""
    interruption: Interruption | None = None


class Exited(RunEnded, frozen=True, kw_only=True):
    """It has exited and freed its networks, so a client that waits for the exit may reuse its port."""


class ReleaseRun(LifeEvent, frozen=True):
    """Free the remaining resources that only a run needs."""


class Retired(LifeEvent, frozen=True):
    """It will never run again, and has freed all resources that only a run needs."""


class Discard(LifeEvent, frozen=True):
    """It has no processes left, so it may be deleted."""


class Discarded(LifeEvent, frozen=True):
    """Only the record in memory is left."""


class Cleaned(LifeEvent, frozen=True):
    """An interrupted run has been cleaned up."""


# --- failures -----------------------------------------------------------------------------------------------------


class EffectFailed(LifeEvent, frozen=True):
    """An effect has failed."""

    reason: str
    exit_code: int = 128
    """Docker's exit code of a failed start."""
    is_cancelled: bool = False
    """Whether the caller was cancelled during an interruptible effect."""
    by_policy: bool = False
    old_name: str = ""
    """The name to restore after a failed rename."""


class CreateFailed(EffectFailed, frozen=True):
    """A creation has failed."""


class StartFailed(EffectFailed, frozen=True):
    """A start has failed."""


class StartUndone(EffectFailed, frozen=True):
    """A failed start has been cleaned up."""


class RenameFailed(EffectFailed, frozen=True):
    """The networks have refused the new name."""


class PauseFailed(EffectFailed, frozen=True):
    """The runtime's command to freeze or thaw has failed."""


class RemovalFailed(EffectFailed, frozen=True):
    """The container could not be removed completely."""
