"""What only a plain container has: no service asked for it, so its user decides when it runs and where it is.

A task's container has its networks from its making to its end; a plain one has them while it runs, as in Docker.
"""

import msgspec

from skep.model.sandbox import EndpointRequest, NetworkMode


class RestartWish(msgspec.Struct, frozen=True, kw_only=True):
    """``--restart``.  ``name``: no, always, unless-stopped, on-failure; ``attempts_max`` 0: as often as needed."""

    name: str = "no"
    attempts_max: int = 0


class Plain(msgspec.Struct, frozen=True, kw_only=True):
    """What only a container has that no service asked for: its user decides when it runs, and on which networks."""

    mode: NetworkMode = NetworkMode.BRIDGE
    networks: tuple[EndpointRequest, ...] = ()
    """With ``NETWORKS``, in the order of its interfaces."""
    network_mode: str = "default"
    """As the user wrote it."""
    restart: RestartWish = RestartWish()
    auto_remove: bool = False
    restarts: int = 0
    """How often its policy has started it since the user did."""
    is_stopped: bool = False
    """By its user: only he starts it again."""
    security_options: tuple[str, ...] = ()
    """As the user wrote them."""
    attached: tuple[str, ...] = ()
    """Which of its streams the client took when it was made: stdin, stdout, stderr."""
