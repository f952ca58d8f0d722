"""Bodies that are read to find out for whom they are: what cannot be read goes to those who refuse it."""

import pytest
from aiohttp import web

from skep.node.routes.cluster_volumes import _is_for_cluster
from skep.node.routes.plain_containers import _Request, _request_of

DEEP = b"[" * 100_000 + b"]" * 100_000
BODIES = [
    b'{"Other": %b}' % DEEP,
    b'{"ClusterVolumeSpec": %b}' % DEEP,
    b'{"ClusterVolumeSpec": "\xff"}',
    b"\xff",
    b"9",
]


class Sent:
    """A request with a body."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def read(self) -> bytes:
        return self._body


@pytest.mark.parametrize("body", BODIES)
async def test_a_volume_is_the_clusters_only_if_that_can_be_read(body: bytes) -> None:
    sent: web.Request = Sent(body)  # type: ignore[assignment]
    assert not await _is_for_cluster(sent)


@pytest.mark.parametrize(
    "body", [b'{"Other": %b}' % DEEP, b'{"HostConfig": {"NetworkMode": "\xff"}}', b"\xff"]
)
def test_a_container_on_no_network_that_can_be_read_is_the_engines(body: bytes) -> None:
    assert _request_of(body) == _Request()
