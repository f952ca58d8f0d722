"""Reading the catalog from a manager, and what is said if there is none."""

from typing import Any

import pytest

from skep.aio.clock import SystemClock
from skep.catalog.following import CatalogReader
from skep.errors import Unavailable
from skep.node.cluster.swarm_info import LOCKED, NOT_A_MANAGER


class Refusing:
    """A node that refuses to show the catalog."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def request(self, *_: Any, **__: Any) -> Any:
        raise Unavailable(self._reason)


@pytest.mark.parametrize(
    ("reason", "said"), [(NOT_A_MANAGER, "choose a manager with --host or --context"), (LOCKED, LOCKED)]
)
async def test_a_worker_is_told_apart_from_a_manager_in_trouble(reason: str, said: str) -> None:
    reader = CatalogReader(Refusing(reason), SystemClock(), print)  # type: ignore[arg-type]
    with pytest.raises(Unavailable) as raised:
        async with reader.following():
            pass
    assert str(raised.value).endswith(said)
