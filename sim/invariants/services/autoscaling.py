"""Rules on the numbers of tasks that autoscaling writes, whichever manager leads."""

from collections.abc import Iterable

from sim.world.committed import Change
from skep.model.options.autoscaling import autoscaling_of
from skep.model.service import PAUSED, UNDER_WAY, Service
from skep.model.values.ids import ServiceId
from skep.store.interface import Deleted, Updated, View

COMMITTED_S = 1.0
"""Seconds from a decision to its commit, by which the time between two commits may be shorter."""


class AutoscalingIsCalm:
    """Autoscaling keeps within its range, and at most doubles the number of tasks in a step.

    It does not scale during an update, nor down within the window after it has scaled up.  A request may wake a service
    without tasks at any time, and the last task stays for the idle time afterwards.
    """

    def __init__(self) -> None:
        self._added_at: dict[ServiceId, float] = {}
        """Time at which autoscaling last added tasks to a service."""
        self._woken_at: dict[ServiceId, float] = {}
        """Time at which a request last woke a service."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Updated(Service() as old, Service() as new) if old.autoscaled != new.autoscaled:
                    yield from self._scaled(old, new, change.time_s)
                case Deleted(Service() as service):
                    self._added_at.pop(service.id, None)
                    self._woken_at.pop(service.id, None)

    def _scaled(self, old: Service, new: Service, now: float) -> Iterable[str]:
        scaling, before, after = autoscaling_of(new.spec.labels), old.spec.replicas, new.spec.replicas
        if scaling is None or old.spec.labels != new.spec.labels:
            yield f"{new.id} is scaled, which its labels do not say"
            return
        if not scaling.least <= after <= scaling.most:
            yield f"{new.id} is scaled to {after}, out of {scaling.least} to {scaling.most}"
        if not before:
            self._woken_at[new.id] = now
            if after not in {1, *(one.least for one in scaling.schedule)} or scaling.least:
                yield f"{new.id} is woken with {after} tasks"
            return
        state = old.update_status.state if old.update_status is not None else None
        if state in (*UNDER_WAY, *PAUSED):
            yield f"{new.id} is scaled though its update is {state.value}"
        if after > before:
            self._added_at[new.id] = now
            is_scheduled = after in {one.least for one in scaling.schedule}
            if after > 2 * before and before >= scaling.least and not is_scheduled:
                yield f"{new.id} is scaled from {before} to {after} at once"
        elif not after:
            idle_s = now - self._woken_at.get(new.id, float("-inf"))
            if before != 1 or idle_s < scaling.idle_after_s - COMMITTED_S:
                yield f"{new.id} is scaled from {before} to 0, {idle_s:.0f} s after a request has woken it"
        elif before <= scaling.most and after not in {one.most for one in scaling.schedule}:
            since = now - self._added_at.get(new.id, float("-inf"))
            if since < scaling.down_after_s - COMMITTED_S:
                yield f"{new.id} is scaled down {since:.0f} s after it was scaled up"
