"""The WireGuard key pairs of this node: loaded, rotated and saved."""

from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.aio.failures import describe_error, log_error
from skep.dataplane.plan.rotation import Handshake, KeyLifetimes, Overlap, next_pairs, observed
from skep.dataplane.plan.wireguard import Session, WireGuardKey, WireGuardPlan
from skep.dataplane.wireguard import keys
from skep.errors import Unavailable

log = structlog.get_logger()


class OwnKeys:
    """The key pairs of this node.  ``say`` sets a node condition."""

    def __init__(
        self,
        path: Path,
        since_boot: Callable[[], float],
        limits: KeyLifetimes,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        """Create an empty set of keys.

        Args:
            path: File of the keys.
            since_boot: Returns the seconds since boot, the same for all processes of a boot.
        """
        self._path = path
        self._since_boot = since_boot
        self._limits = limits
        self._clock = clock
        self._say = say
        self.pairs: tuple[WireGuardKey, ...] = ()
        """The pairs, or empty until they were loaded or created."""
        self._unread = ""
        """Reason why the keys of an earlier process cannot be read at present.

        Until then, no key is used or created.
        """
        self._are_saved = True
        self._overlap = Overlap()

    def require(self) -> None:
        """Check that the keys are readable.  Raises: Unavailable."""
        if self._unread:
            raise Unavailable(self._unread)

    def due(
        self, plan: WireGuardPlan, handshakes: Mapping[Session, Handshake] | None, *, is_settled: bool
    ) -> tuple[WireGuardKey, ...]:
        """Return the key pairs that are due now.  Raises: Unavailable: they cannot be read.

        Args:
            is_settled: Whether peers are known not to need the keys, although handshakes were not read.
        """
        pairs, now = self.pairs or self._loaded(), self._clock.monotonic()
        if handshakes is not None or is_settled:
            self._overlap = observed(self._overlap, pairs, plan.peers, handshakes or {}, now)
        self._keep(
            next_pairs(
                pairs,
                self._overlap,
                keys.new_private_key,
                boot_s=self._since_boot(),
                now=now,
                limits=self._limits,
            )
        )
        return self.pairs

    def _loaded(self) -> tuple[WireGuardKey, ...]:
        """Return the key pairs of an earlier process.  New ones would end the tunnels with every other node."""
        try:
            pairs = keys.load(self._path)
        except OSError as error:
            self._unread = f"this node's WireGuard keys cannot be read: {describe_error(error)}"
            self._say(self._unread)
            raise Unavailable(self._unread) from error
        self._unread = ""
        return pairs

    def _keep(self, pairs: tuple[WireGuardKey, ...]) -> None:
        if pairs == self.pairs and self._are_saved:
            return
        try:
            keys.save(self._path, pairs)
            self._are_saved = True
        except OSError as error:  # retried, because otherwise the next node process would create new keys
            if self._are_saved:
                log_error(error, "wireguard keys not saved, retrying")
            self._are_saved = False
        if self.pairs and pairs != self.pairs:
            log.info("wireguard key rotated", keys=len(pairs))
        self.pairs = pairs
