"""What permissions depend on in a service to be made or changed."""

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control.new_objects import new_service
from skep.model.service import Service, ServiceSpec
from skep.store.memory import MemoryStore
from tests.support.builders import a_service, a_service_spec


def of_priority(priority: int) -> ServiceSpec:
    return replace(a_service_spec("shop_web"), labels={"skep.priority": str(priority)})


async def test_a_priority_is_raised_above_0_and_above_what_the_service_has() -> None:
    store = MemoryStore(SystemClock())

    def raised(priority: int) -> int:
        return new_service(store.view(), of_priority(priority)).raised_priority

    assert (raised(-5), raised(0), raised(10)) == (0, 0, 10)
    for present, wanted in ((10, (0, 0, 0, 11)), (-10, (0, 0, 10, 11))):
        service: Service = a_service("shop_web", spec=of_priority(present))
        await store.update(lambda tx, one=service: tx.put(one))
        assert tuple(map(raised, (-5, 0, 10, 11))) == wanted
