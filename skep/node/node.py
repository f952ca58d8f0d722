"""The composition root of a node: creates each of its layers once and runs them.

The foundation comes first, then the task runtime, the tables of cluster networks, the agent, the membership of a
cluster, and the Engine API.  Each layer receives the layers below it when it is created.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

from skep.aio.event_loop.gc_settings import freeze
from skep.configuration.configuration import Configuration
from skep.dataplane.tables.files import StoredTables
from skep.dataplane.tables.network_tables import NetworkTables
from skep.engine.runtime.runtime import end_all_gracefully
from skep.linux.files import file_exists
from skep.model.node_reports.conditions import ConditionName
from skep.model.values.ids import new_id
from skep.node.cluster.membership import Membership
from skep.node.front.application import serving
from skep.node.host.disk_check import DiskCheck
from skep.node.host.disk_space import DiskSpace
from skep.node.host.environment import NodeEnvironment
from skep.node.host.pending_reboot import keep_condition, look
from skep.node.host.reaping import reap_orphans
from skep.node.layers.agent_parts import AgentParts
from skep.node.layers.engine_api import EngineApi
from skep.node.layers.foundation import Foundation
from skep.node.layers.task_runtimes import Run, task_runtime
from skep.node.part_runner import run_part, wait_briefly
from skep.node.routes.system import ping_response
from skep.node.telemetry.metrics_server import serving_metrics

_CONTAINERS_FOUND_S_MAX = 15.0
"""Seconds after which the API is served even before the containers of earlier processes are found."""


class Node:
    """One node.  ``run`` runs it."""

    def __init__(self, configuration: Configuration, environment: NodeEnvironment) -> None:
        foundation = self._foundation = Foundation(configuration, environment)
        runtime = self._runtime = task_runtime(foundation)
        self._shared_tables = runtime.shared_tables()
        self._tables = NetworkTables(
            StoredTables(foundation.paths.kept_tables, foundation.clock),
            runtime.network_listeners(self._shared_tables),
            foundation.session,
            foundation.clock,
            environment.random.random,
        )
        self._agent = AgentParts(foundation, runtime, self._tables)
        self._disk_space = DiskSpace(
            foundation.paths.written,
            runtime.list,
            foundation.present_configuration,
            environment.conditions,
            foundation.clock,
            foundation.session.description_changed.set,
        )
        self._membership = Membership(
            self._agent.dependencies(),
            manager_api=foundation.manager_api,
            new_id=new_id,
            show_condition=environment.conditions.reporter(ConditionName.SWARM),
        )
        self._api = EngineApi(foundation, runtime, self._agent, self._membership, self._disk_space)

    async def run(self, ready: Callable[[], None]) -> None:
        """Run until cancelled.  Calls ``ready`` once the API is served.

        Raises: SkepError: cannot listen on a host, or the data directory is damaged.
        """
        foundation, runtime, agent, api = self._foundation, self._runtime, self._agent, self._api
        environment, clock, worker = foundation.environment, foundation.clock, agent.worker
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            run = partial(run_part, group, clock)
            run(environment.processes.net.run, "net process")
            await foundation.open_apis(stack)
            run(await agent.offers.prepare(), "offers of the machine")
            run(await self._disk_space.prepare(), "disk space")
            await runtime.open()
            if file_exists(foundation.paths.node_json):
                await self._tables.restore(self._shared_tables)
            app = await api.application(self._tables, worker)
            users = api.users(run)
            here = await stack.enter_async_context(serving(app, partial(ping_response, api.system)))
            front = api.front(here, users)
            self._run_checks(run)
            group.create_task(worker.run(), name="worker")
            run(agent.usages.run, "usage of tasks")
            runtime.run_networks(run, self._tables)
            group.create_task(self._membership.run(), name="membership")
            runtime.run_engine(run, worker.wait_ready)
            await wait_briefly(worker.wait_ready(), _CONTAINERS_FOUND_S_MAX, clock)
            configuration = foundation.configuration
            await stack.enter_async_context(serving_metrics(configuration, api.metrics))
            dashboard = api.serving_dashboard(users, front)
            async with front.listening(configuration.api_hosts), dashboard:
                runtime.run_apis(run, front.serve)
                freeze()
                ready()
                await asyncio.Event().wait()

    async def announce_stop(self) -> None:
        """Announce a planned stop to the manager, so that it replaces no tasks during the restart.

        Failover addresses are given up first, so that another node has them before this process ends.
        """
        await self._runtime.give_up_addresses()
        await self._foundation.session.announce_stop()

    async def stop_containers(self) -> None:
        """Stop the containers of a rootless node after ``run``, because they end with the node's process namespace.

        Their records still show them as running.  The next node process finds that they have ended, and applies
        restart policies as after a reboot.
        """
        if self._foundation.environment.features.is_rootless:
            await end_all_gracefully(self._runtime.list())

    def reload(self, configuration: Configuration) -> None:
        """Apply those parts of ``configuration`` that need no restart."""
        self._foundation.configuration = configuration
        self._foundation.environment.processes.net.reload()
        self._membership.reload()
        self._api.system.configure(configuration)
        self._runtime.reload(configuration)

    def _run_checks(self, run: Run) -> None:
        """Run the checks that keep this node's conditions current, and the background work of images and volumes."""
        paths, clock = self._foundation.paths, self._foundation.clock
        conditions = self._foundation.environment.conditions
        run(partial(reap_orphans, clock), "orphans")
        self._runtime.run_checks(run)
        run(self._agent.image_sharing.collect, "image collection")
        describe = self._foundation.session.description_changed.set
        run(
            DiskCheck((paths.data, paths.run), conditions, clock, paths.store_full, describe).run,
            "disk check",
        )
        run(partial(keep_condition, conditions, clock, describe, partial(look, clock)), "pending reboot")
        run(self._api.metrics.run, "metrics")
        self._foundation.run(run)
