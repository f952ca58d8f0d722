"""What of a client's request for a task's container goes to the node."""

import pytest
from aiohttp.test_utils import make_mocked_request

from skep.errors import InvalidArgument
from skep.manager.routes.reach import _head

UPGRADE = {"Connection": "Upgrade", "Upgrade": "tcp"}


def a_request(rest: str, headers: dict[str, str], *, has_body: bool = False):
    """``POST /skep/tasks/t1/REST``."""
    given = {"payload": object()} if has_body else {}
    return make_mocked_request("POST", f"/skep/tasks/t1/{rest}", headers=headers, **given)


@pytest.mark.parametrize(
    ("rest", "upgrades"),
    [
        ("container/attach", True),
        ("exec/e1/start", True),
        ("container/exec", False),
        ("container/resize", False),
        ("container/archive", False),
        ("exec/e1/resize", False),
    ],
)
def test_only_attach_and_the_start_of_an_exec_upgrade(rest, upgrades):
    lines = _head(a_request(rest, UPGRADE), "/x").decode().splitlines()
    assert ("Upgrade: tcp" in lines) is upgrades
    assert ("Connection: close" in lines) is not upgrades


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity", ""])
def test_an_encoded_body_is_refused(encoding):
    request = a_request("container/archive", {"Content-Encoding": encoding, "Content-Length": "9"})
    with pytest.raises(InvalidArgument, match="Content-Encoding"):
        _head(request, "/x")


def test_a_body_in_chunks_is_refused_where_the_connection_upgrades():
    chunked = {"Transfer-Encoding": "chunked"}
    request = a_request("exec/e1/start", UPGRADE | chunked, has_body=True)
    with pytest.raises(InvalidArgument, match="Transfer-Encoding: chunked"):
        _head(request, "/x")
    plain = a_request("container/archive", chunked, has_body=True)
    assert b"\r\nTransfer-Encoding: chunked\r\n" in _head(plain, "/x")
