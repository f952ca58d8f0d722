"""Nothing in the package is unused: what only tests call is either a way to observe, and listed here, or gone."""

import re
from functools import cache

import pytest
from vulture.core import Vulture

from tests.support.harness.documents import ROOT

pytestmark = pytest.mark.timeout(300)
"""Everything is parsed: ten seconds on an idle machine, minutes on one that runs other tests beside."""

USED_BY_OTHERS = {
    "add_prefix": "called by aiohttp",
    "get_info": "called by aiohttp",
    "raw_match": "called by aiohttp",
    "url_for": "called by aiohttp",
    "_call_eof_received": "called by the base class (asyncio.sslproto)",
    "_ssl_buffer": "read by the base class (asyncio.sslproto)",
    "_ssl_buffer_view": "read by the base class (asyncio.sslproto)",
    "_write_backlog": "read by the base class (asyncio.sslproto)",
    "datagram_received": "called by asyncio",
    "feed_eof": "called by aiohttp",
    "cert_verify": "called by requests",
    "format_commands": "called by click",
    "format_epilog": "called by click",
    "get_buffer": "called by asyncio",
    "header_table_size": "read by hpack",
    "list_commands": "called by click",
    "max_allowed_table_size": "read by hpack",
    "num_tickets": "read by ssl",
    "type_url": "a field of a protobuf message",
    "__spec__": "read by the import system",
}
OBSERVED_BY_TESTS = {
    "comparisons": "a test waits until a namespace was compared so many times",
    "held_bytes": "a test holds a server to its bound",
    "write_archive": "tests write images",
}
_BY_TEXTUAL = re.compile(r"(action|on)_\w+$|(check_action|compose|display|render_line|virtual_size)$")
"""Names that Textual calls or reads; tests/unit/top shows that each action has a key."""
ROUTES = ["get", "post", "put", "delete", "head", "route", "command", "group"]


@cache
def unused() -> dict[str, str]:
    """What nothing in the package, the simulator or the benchmarks uses: name -> where it is.

    Without fields: the serialized form may be read elsewhere.
    """
    finder = Vulture(ignore_decorators=[f"@*.{word}" for word in ROUTES])
    finder.scavenge(
        [str(ROOT / folder) for folder in ("skep", "sim", "bench")], exclude=["*_pb2.py", "*/results/*"]
    )
    return {
        item.name: f"{item.filename}:{item.first_lineno}"
        for item in finder.get_unused_code(min_confidence=60)
        if item.typ != "variable"
        and item.filename.is_relative_to(ROOT / "skep")
        and not (item.filename.is_relative_to(ROOT / "skep/top") and _BY_TEXTUAL.match(item.name))
    }


def test_nothing_is_unused() -> None:
    allowed = USED_BY_OTHERS.keys() | OBSERVED_BY_TESTS.keys()
    assert {name: place for name, place in unused().items() if name not in allowed} == {}


def test_the_lists_name_nothing_that_is_used_or_gone() -> None:
    assert sorted((USED_BY_OTHERS.keys() | OBSERVED_BY_TESTS.keys()) - unused().keys()) == []
