"""Whatever is sent to a node's ``/networks``: an answer in Docker's form, never an error of ours."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.networks.network_rigs import Rig, a_rig

OURS = "internal error"
words = st.text(max_size=8) | st.sampled_from(
    [
        "docker_gwbridge",
        "bridge",
        "ingress",
        "o1",
        "overlay",
        "swarm",
        "local",
        "10.9.0.0/24",
        "fd00::/64",
        "-1",
        "\0",
    ]
)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | words
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=10,
)
subnets = st.fixed_dictionaries(
    {},
    optional={
        "Subnet": words,
        "Gateway": words,
        "IPRange": words,
        "AuxiliaryAddresses": st.dictionaries(words, words, max_size=2),
    },
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "Name": words,
        "Driver": words | st.sampled_from(["overlay", "bridge", "macvlan"]),
        "Scope": words,
        "Ingress": st.booleans(),
        "Attachable": st.booleans(),
        "Internal": st.booleans(),
        "EnableIPv6": st.booleans(),
        "ConfigOnly": st.booleans(),
        "ConfigFrom": st.fixed_dictionaries({"Network": words}),
        "IPAM": st.fixed_dictionaries(
            {}, optional={"Driver": words, "Config": st.lists(subnets, max_size=3)}
        ),
        "Options": st.dictionaries(words, words, max_size=2),
        "Labels": st.dictionaries(words, words, max_size=2),
    },
)


class Asking:
    """A rig whose loop runs while something is asked."""

    def __init__(self, runner: asyncio.Runner, rig: Rig) -> None:
        self._runner = runner
        self._rig = rig

    def check(self, method: str, path: str, body: bytes = b"") -> int:
        async def ask() -> tuple[int, bytes]:
            async with self._rig.client.request(method, path, data=body) as response:
                return response.status, await response.read()

        status, content = self._runner.run(ask())
        if status >= 400:
            message = msgspec.json.decode(content)["message"]
            assert message
            assert OURS not in message
        return status


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    folder: Path = tmp_path_factory.mktemp("anything")
    with asyncio.Runner() as runner:
        context = a_rig(folder)
        rig = runner.run(context.__aenter__())
        try:
            yield Asking(runner, rig)
        finally:
            runner.run(context.__aexit__(None, None, None))


@settings(max_examples=200, deadline=None)
@given(body=bodies | anything)
def test_any_network_request_is_accepted_or_refused_with_a_message(asking: Asking, body: Any) -> None:
    asking.check("POST", "/networks/create", msgspec.json.encode(body))
    assert asking.check("GET", "/networks") == 200


@settings(max_examples=100, deadline=None)
@given(
    name=words,
    verb=st.sampled_from(["connect", "disconnect", "update"]),
    body=anything | st.binary(max_size=40),
)
def test_any_name_and_body_is_answered(asking: Asking, name: str, verb: str, body: Any) -> None:
    place = quote(name, safe="")
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    asking.check("POST", f"/networks/{place}/{verb}", raw)
    asking.check("GET", f"/networks/{place}?verbose=1")
    asking.check("DELETE", f"/networks/{place}")


@settings(max_examples=100, deadline=None)
@given(filters=anything)
def test_any_filter_is_answered(asking: Asking, filters: Any) -> None:
    text = quote(msgspec.json.encode(filters).decode(), safe="")
    asking.check("GET", f"/networks?filters={text}")
    asking.check("POST", f"/networks/prune?filters={text}")
