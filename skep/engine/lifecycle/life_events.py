"""Events in the life of a container: requests, reports of effects, and failures."""

from collections.abc import Callable

import msgspec

from skep.engine.container import Container, ContainerConfig, Health, Interruption, ProcessName, RestartPolicy
from skep.engine.events import NamedNetwork
from skep.model.sandbox import EndpointRequest, NetworkMode, Sandbox
from skep.model.times import Timestamp


class Event(msgspec.Struct, frozen=True):
    """Something that was requested, was observed, or follows an effect."""


# --- requests -----------------------------------------------------------------------------------------------------


class Create(Event, frozen=True):
    """Prepare a new container."""


class UserStarts(Event, frozen=True):
    """Its user wants a plain container to run.  Recorded at once, while the start may wait for other operations."""


class UserStops(Event, frozen=True):
    """Its user wants a plain container not to run."""


class Start(Event, frozen=True):
    """Start the command."""

    secret_env: tuple[str, ...] = ()
    """Variables of this run, which no record contains."""
    by_policy: bool = False
    """Whether the restart policy starts it."""
    ignore_stop: bool = False
    """Whether the policy starts it even if its user has stopped it."""


class Signal(Event, frozen=True):
    """Send a signal to the first process."""

    number: int


class Pause(Event, frozen=True):
    """Freeze the run of ``process``."""

    process: ProcessName | None


class Unpause(Event, frozen=True):
    """Thaw the run of ``process``."""

    process: ProcessName | None


class Exec(Event, frozen=True):
    """Run an additional process.  ``word`` is the user's name for the container."""

    word: str


class Update(Event, frozen=True):
    """Change limits and the restart policy, as ``change`` returns them.  It raises what it refuses."""

    change: Callable[[Container], Container]


class Connect(Event, frozen=True):
    """Connect a plain container to another network, now or at its start."""

    request: EndpointRequest


class Disconnect(Event, frozen=True):
    """Disconnect a plain container from a network."""

    network: str
    """The user's word for it."""
    network_id: str = ""
    """Its id if known."""


class Rename(Event, frozen=True):
    """Rename a plain container, also on its networks."""

    name: str


class Retire(Event, frozen=True):
    """Free what only a run needs: a task's container will never run."""


class Remove(Event, frozen=True):
    """Remove the container, ``force`` even if it runs."""

    force: bool = False


class Adopted(Event, frozen=True):
    """A new node process has read the record and looked at the world."""

    at: Timestamp
    has_run: bool = False
    """Whether the recorded process was started, even if it has ended."""
    is_frozen: bool = False
    has_network: bool = False
    """Whether its sandbox is usable."""
    has_leftovers: bool = False
    """Whether something of an interrupted start or of an end that was not completed may exist."""
    health: Health | None = None
    """Health at the start of a run."""


# --- reports ------------------------------------------------------------------------------------------------------


class Made(Event, frozen=True):
    """The directories exist."""


class Attached(Event, frozen=True):
    """The networks are attached."""

    sandbox: Sandbox


class Written(Event, frozen=True):
    """The bundle is written."""

    warnings: tuple[str, ...]


class ProcessCreated(Event, frozen=True):
    """The first process exists and waits."""

    process: ProcessName
    monitor: ProcessName


class Started(Event, frozen=True):
    """The first process executes the command."""

    at: Timestamp
    health: Health | None
    by_policy: bool = False


class Attempted(Event, frozen=True):
    """A start has succeeded or failed."""

    by_policy: bool = False


class Frozen(Event, frozen=True):
    """The run of ``process`` is frozen."""

    process: ProcessName | None


class Thawed(Event, frozen=True):
    """The run of ``process`` continues."""

    process: ProcessName | None


class Probed(Event, frozen=True):
    """The run of ``process`` was probed and has this health."""

    process: ProcessName | None
    health: Health


class Updated(Event, frozen=True):
    """Limits apply to the processes."""

    config: ContainerConfig
    restart: RestartPolicy | None
    """Restart policy, or None for a task's container."""
    warnings: tuple[str, ...]


class NetworksChanged(Event, frozen=True, kw_only=True):
    """A run was connected to a network or disconnected from it."""

    sandbox: Sandbox
    mode: NetworkMode
    networks: tuple[EndpointRequest, ...]
    mac_address: str
    action: str
    """Docker's event: connect or disconnect."""
    network: NamedNetwork


class RunEnded(Event, frozen=True, kw_only=True):
    """The first process has ended."""

    at: Timestamp
    exit_code: int
    oom_killed: bool = False
    error: str = ""
    interruption: Interruption | None = None


class Exited(RunEnded, frozen=True, kw_only=True):
    """It has ended and freed its networks, so a client that waits for the end may reuse its port."""


class Release(Event, frozen=True):
    """Free the remaining resources that only a run needs."""


class Retired(Event, frozen=True):
    """It will never run again, and all resources that only a run needs are free."""


class Discard(Event, frozen=True):
    """It has no process left, so it may be deleted."""


class Discarded(Event, frozen=True):
    """Only the record in memory is left."""


class Cleaned(Event, frozen=True):
    """An interrupted run has been cleaned up."""


# --- failures -----------------------------------------------------------------------------------------------------


class Failure(Event, frozen=True):
    """An effect has failed."""

    reason: str
    exit_code: int = 128
    """Docker's exit code of a failed start."""
    is_cancelled: bool = False
    """Whether the caller has left during an interruptible effect."""
    by_policy: bool = False
    old_name: str = ""
    """The name to which a failed rename returns."""


class CreateFailed(Failure, frozen=True):
    """A creation has failed."""


class StartFailed(Failure, frozen=True):
    """A start has failed."""


class StartUndone(Failure, frozen=True):
    """A failed start has been cleaned up."""


class RenameFailed(Failure, frozen=True):
    """The networks have refused the new name."""


class PauseFailed(Failure, frozen=True):
    """The runtime's command to freeze or thaw has failed."""


class RemovalFailed(Failure, frozen=True):
    """A part of the container could not be removed."""


class AdoptionFailed(Failure, frozen=True):
    """A container that never ran could not be prepared again."""
