"""Which paths of Docker's API are refused with a reason, and which are not found."""

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.api.http.server import application
from skep.node.routes.system import unsupported_routes


@pytest.mark.parametrize(
    ("method", "path", "has_containers", "status", "reason"),
    [
        ("GET", "/v1.41/nosuch", True, 404, "page not found"),
        ("GET", "/nosuch", False, 404, "page not found"),
        ("GET", "/", True, 404, "page not found"),
        ("GET", "/volumes/x/y", True, 404, "page not found"),
        ("PUT", "/v1.41/containers/json", True, 404, "page not found"),
        ("POST", "/plugins/pull?remote=x", True, 501, "engine plugins are not supported"),
        ("GET", "/v1.41/plugins/privileges", True, 501, "engine plugins are not supported"),
        ("POST", "/containers/c1/checkpoints", True, 501, "This experimental feature is disabled"),
        ("GET", "/v1.41/volumes", False, 501, "--engine-socket"),
        ("POST", "/v1.41/build/prune", False, 501, "POST /build/prune is not answered by this node"),
        ("POST", "//containers/create/", False, 501, "not containers"),
        ("GET", "/containers/json", False, 404, "page not found"),
    ],
)
async def test_a_reason_for_what_docker_has_and_404_for_the_rest(
    method: str, path: str, *, has_containers: bool, status: int, reason: str
) -> None:
    app = application(unsupported_routes(has_containers=has_containers))
    async with TestClient(TestServer(app)) as client:
        host = (
            f"http://{client.host}:{client.port}"  # the client's own takes what follows two slashes for one
        )
        response = await client.session.request(method, f"{host}{path}")
        assert response.status == status
        assert reason in (await response.json())["message"]
