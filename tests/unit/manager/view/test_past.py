"""The rows of an earlier state: those of the present one, as they would have been."""

import asyncio
import json

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.view.building import snapshot_of
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task


def test_an_earlier_state_has_the_rows_of_a_snapshot() -> None:
    def fill(tx: Transaction) -> None:
        tx.put(Swarm(id=ClusterId("cluster")))
        spec = a_service_spec("web", replicas=2, image="busybox:1")
        labels = {"com.docker.stack.namespace": "shop"}
        web = tx.put(a_service("web", spec=replace(spec, labels=labels)))
        tx.put(a_node("n1"))
        tx.put(a_task("t1", service=web.id, node="n1"))

    async def rows() -> dict[str, object]:
        store = MemoryStore(SystemClock())
        await store.update(fill)
        data = await snapshot_of(store.view(), 1, 1_800_000_000.0, SystemClock())
        found: dict[str, object] = json.loads(data)
        assert str(found["cursor"]) == f"1-{store.view().revision}"
        return found

    found = asyncio.run(rows())
    assert found["time"] == 1_800_000_000.0
    ((service,), (task,), (stack,)) = found["services"], found["tasks"], found["stacks"]  # type: ignore[misc]
    assert (service["name"], service["running"], service["desired"], service["image"]) == (
        "web",
        1,
        2,
        "busybox:1",
    )
    assert (task["id"], task["node"], task["state"]) == ("t1", "n1", "running")
    assert (stack["name"], stack["services"]) == ("shop", [service["id"]])
    assert found["cluster"]["id"] == "cluster"  # type: ignore[index]
