"""Which names of ``skep exec``, ``attach``, ``cp`` and ``logs`` are for docker."""

from typing import Any

import pytest

from skep.cli.apps.targets import find_target_or_docker
from skep.errors import NotFound, Unavailable
from skep.node.cluster.swarm_info import NOT_A_MANAGER


class _Node:
    """The API of a node with one container, which is a worker."""

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal

    async def get(self, path: str) -> Any:
        if path.startswith("/skep/tasks/"):
            raise Unavailable(self._refusal)
        if path != "/containers/here/json":
            raise NotFound("No such container")
        return {}


async def _found(word: str, refusal: str) -> Any:
    client: Any = _Node(refusal)
    return await find_target_or_docker(client, word)


async def test_a_worker_says_that_it_knows_no_services_unless_it_has_such_a_container() -> None:
    assert await _found("here", NOT_A_MANAGER) is None
    with pytest.raises(Unavailable, match="Worker nodes can't be used"):
        await _found("web", NOT_A_MANAGER)


async def test_a_node_without_a_swarm_leaves_every_name_to_docker() -> None:
    alone = 'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect'
    assert await _found("web", alone) is None


async def test_other_failures_of_managers_are_shown() -> None:
    with pytest.raises(Unavailable, match="does not have a leader"):
        await _found("here", "The swarm does not have a leader.")
