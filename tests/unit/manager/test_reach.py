"""What of a client's request for a task's container goes to the node."""

from urllib.parse import parse_qs

import pytest
from aiohttp.test_utils import make_mocked_request

from skep.api.formats.forwarded_requests import FORWARDED, Forwarded, forwarded
from skep.errors import InvalidArgument
from skep.manager.routes.reach import _head, _read_body

UPGRADE = {"Connection": "Upgrade", "Upgrade": "tcp"}
PATHS = {
    "container/attach": "/containers/{id}/attach",
    "container/exec": "/containers/{id}/exec",
    "container/resize": "/containers/{id}/resize",
    "exec/e1/start": "/exec/{id}/start",
    "exec/e1/resize": "/exec/{id}/resize",
}
ARCHIVE = forwarded("PUT", "/containers/{id}/archive")


def a_request(rest: str, headers: dict[str, str], *, has_body: bool = False, method: str = "POST"):
    """``POST /skep/tasks/t1/REST``."""
    given = {"payload": object()} if has_body else {}
    return make_mocked_request(method, f"/skep/tasks/t1/{rest}", headers=headers, **given)


def head_of(rest: str, kind: Forwarded, headers: dict[str, str], body: bytes = b"", **given) -> list[str]:
    request = a_request(rest, headers, method=kind.method, **given)
    return _head(request, kind, "/x", body).decode().splitlines()


@pytest.mark.parametrize(
    ("rest", "upgrades"),
    [
        ("container/attach", True),
        ("exec/e1/start", True),
        ("container/exec", False),
        ("container/resize", False),
        ("exec/e1/resize", False),
    ],
)
def test_only_attach_and_the_start_of_an_exec_upgrade(rest, upgrades):
    lines = head_of(rest, forwarded("POST", PATHS[rest]), UPGRADE)
    assert ("Upgrade: tcp" in lines) is upgrades
    assert ("Connection: close" in lines) is not upgrades


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity", ""])
async def test_an_encoded_body_is_refused(encoding):
    request = a_request("container/archive", {"Content-Encoding": encoding, "Content-Length": "9"})
    with pytest.raises(InvalidArgument, match="Content-Encoding"):
        await _read_body(request, ARCHIVE)


async def test_a_body_in_chunks_is_refused_where_the_connection_upgrades():
    chunked = {"Transfer-Encoding": "chunked"}
    request = a_request("exec/e1/start", UPGRADE | chunked, has_body=True)
    with pytest.raises(InvalidArgument, match="Transfer-Encoding: chunked"):
        await _read_body(request, forwarded("POST", "/exec/{id}/start"))
    assert "Transfer-Encoding: chunked" in head_of("container/archive", ARCHIVE, chunked, has_body=True)


@pytest.mark.parametrize("kind", FORWARDED, ids=lambda kind: f"{kind.method} {kind.path}")
def test_headers_and_query_parameters_that_are_not_named_stay_at_the_manager(kind):
    given = "&".join(f"{name}=1" for name in (*kind.parameters, "privileged", "Privileged", "signal"))
    headers = {"X-Registry-Auth": "c2VjcmV0", "X-Skep-Identity": "root", "Expect": "100-continue"}
    first, *lines = head_of(f"x?{given}", kind, headers)
    assert set(parse_qs(first.split()[1].partition("?")[2])) == set(kind.parameters)
    names = {line.partition(":")[0] for line in lines if line}
    assert names <= {"Host", "Connection", "Upgrade", "Content-Type", "Content-Length", "Transfer-Encoding"}


def test_a_value_cannot_add_a_parameter_or_a_line():
    kind = forwarded("GET", "/containers/{id}/top")
    lines = head_of("x?ps_args=%26size%3D1%0D%0AUpgrade%3A%20tcp%20%23", kind, {})
    assert lines == [
        "GET /x?ps_args=%26size%3D1%0D%0AUpgrade%3A+tcp+%23 HTTP/1.1",
        "Host: node",
        "Connection: close",
        "",
    ]
