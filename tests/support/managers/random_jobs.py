"""Random events around a job, for properties of decisions about its runs."""

from contextlib import suppress

from msgspec.structs import replace

from skep.errors import SkepError
from skep.manager.control.jobs import retry_job, run_job
from skep.manager.services.job_runs import first_job, next_job
from skep.model.service import (
    GlobalJob,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
)
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from tests.support.builders import a_node, a_service, a_service_spec
from tests.support.managers.random_worlds import NODES, RandomWorld
from tests.support.managers.worlds import World

START_NS = 2 * 10**18
"""Time of the first run.  Tasks are created after it, see ``World.apply``."""


class RandomJob(RandomWorld):
    """A job that is updated, run and retried at random times.  Its nodes and tasks change as in ``RandomWorld``."""

    # -- events ------------------------------------------------------------------------------------------------

    def _begin(self) -> World:
        self.is_global = self.random.random() < 0.4
        service = replace(a_service("web"), spec=self._spec("a"))
        world = World(service, nodes=map(a_node, NODES))
        status = first_job(world, service.spec, self._time(world))  # type: ignore[arg-type]
        world.service = replace(service, job_status=status)
        return world

    def _time(self, world: World) -> Timestamp:
        """Return a time after the creation of all tasks."""
        return timestamp(max([START_NS, *(unix_ns(task.created_at) for task in world.tasks.values())]) + 1)

    def _update(self) -> None:
        world, spec = self.world, self._spec(self.random.choice("abc"))
        status = next_job(world, world.service, spec, self._time(world))  # type: ignore[arg-type]
        world.put(replace(world.service, spec=spec, job_status=status))

    def _roll_back(self) -> None:
        """Start the next run."""
        world, replaces = self.world, self.random.random() < 0.5
        with suppress(SkepError):  # it still runs
            run_job(world, world.service.id, now=self._time(world), replaces=replaces)  # type: ignore[arg-type]

    def _pause_or_resume(self) -> None:
        """Retry the failed slots."""
        with suppress(SkepError):  # nothing has failed
            retry_job(self.world, self.world.service.id)  # type: ignore[arg-type]

    def _ask_for_the_last(self) -> None:
        world = self.world
        run_job(world, world.service.id, now=self._time(world), replaces=True)  # type: ignore[arg-type]

    # -- the spec ----------------------------------------------------------------------------------------------

    def _spec(self, image: str) -> ServiceSpec:
        choose = self.random.choice
        restart = RestartPolicy(
            condition=choose((None, RestartCondition.NONE, RestartCondition.ON_FAILURE)),
            delay=choose((0, SECOND_NS)),
            max_attempts=choose((None, 1, 2)),
        )
        spec = a_service_spec(image=image, restart=restart)
        job = ReplicatedJob(max_concurrent=choose((1, 2)), total_completions=choose((1, 2, 3)))
        mode = ServiceMode(global_job=GlobalJob()) if self.is_global else ServiceMode(replicated_job=job)
        return replace(spec, mode=mode)
