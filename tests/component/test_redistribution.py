"""Tasks that are spread again during an upgrade."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from skep.api.client.client import ApiClient
from skep.cli.maintain.upgrade import _Upgrade
from skep.cli.maintain.upgrade_means import Means
from skep.manager.control.tasks import is_up_to_date
from skep.model.task import Task, TaskState
from tests.support.clients.command_rig import Cluster, a_cluster

SOON = "deploy: {replicas: 3, update_config: {monitor: 1ms, parallelism: 1, delay: 1s}, restart_policy: {delay: 10ms}}"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with a_cluster(tmp_path) as made:
        yield made


async def test_an_upgrade_during_a_strict_freeze_waits_until_all_tasks_are_spread_again(
    cluster: Cluster,
) -> None:
    """Its check of freezes covers this, as it covers its drains."""
    cluster.write(f"name: shop\nservices: {{web: {{image: busybox, {SOON}}}}}\n")
    code, _, err = await cluster.deploy()
    assert code == 0, err
    end = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    code, _, err = await cluster.run("cluster", "freeze", "--until", end, "--strict")
    assert code == 0, err
    async with cluster.requests() as client:
        means = Means(version="2.0.0", command="true")
        await _Upgrade(cast("ApiClient", client), means, drains=True, within_s=20.0)._distribute(["shop_web"])
    view = cluster.store.view()
    wanted = [task for task in view.find(Task) if task.is_wanted]
    assert len(wanted) == 3
    assert all(is_up_to_date(view, one) and one.status.state is TaskState.RUNNING for one in wanted)
