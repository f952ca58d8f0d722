"""Skep answers the script as the recorded engine did; every known difference has its reason beside it."""

import asyncio
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.api.errors import status_of
from skep.api.formats.bodies import decode_body
from skep.api.formats.swarm_requests import Interface, founding, joining
from skep.errors import SkepError
from skep.model.swarm import InitRequest, JoinRequest
from skep.store.interface import Store
from tests.conformance import script
from tests.conformance.exchange import Memory, Recorded, recorded, request_of
from tests.conformance.manager import a_manager, a_store_on_etcd
from tests.conformance.script import IN_SWARM, INITS, Step

FOLDER = Path(__file__).parent

DIFFERENCES = {
    "a version too new": "we speak newer versions too",
    "a version too old": "we speak from 1.24 on, which still answers errors in JSON",
    "the service by its name in another case": "names are unique without regard to case, and found so",
    "the swarm": "agents of skep nodes report once a second by default, not every five",
    "the swarm before an update": "as `the swarm`",
    "a network in use": "the error also names the users",
    "a body of 3 MB": "our bound on one object is 1 MiB, and says so",
    "init listening on a port that is none": "refused before anything is started",
    "join with a token that is none": "the token is checked by the node process",
    "odd: a constraint that compares": "constraints may compare here, and the error says with which values",
}
"""Step name -> why the answer differs.  ``docs/conformance.md`` lists the same names."""

OF_LOOPS = frozenset({"tasks that should run"})
"""Needs the leader's loops, which do not run here."""

OF_THE_NODE = frozenset({"another init", "a join of what has joined", "a leave of the last manager"})
"""Asked of the node process, not of the manager."""


@cache
def recording(name: str) -> dict[str, Recorded]:
    answers = msgspec.json.decode((FOLDER / "recorded" / f"{name}.json").read_bytes(), type=list[Recorded])
    return {response.name: response for response in answers}


@pytest.fixture(scope="module", params=["memory", pytest.param("etcd", marks=pytest.mark.needs("etcd"))])
def answers(request: pytest.FixtureRequest) -> dict[str, Recorded]:
    """What a manager answers to the whole script, in order."""
    return asyncio.run(ask_everything() if request.param == "memory" else ask_everything_on_etcd())


async def ask_everything_on_etcd() -> dict[str, Recorded]:
    async with a_store_on_etcd() as store:
        return await ask_everything(store)


async def ask_everything(store: Store | None = None) -> dict[str, Recorded]:
    memory = Memory()
    async with a_manager(store) as app, TestClient(TestServer(app)) as client:
        memory.keep("node", (await (await client.get("/nodes")).json())[0])
        return {
            step.name: await ask(client, step, memory) for step in IN_SWARM if step.name not in OF_THE_NODE
        }


async def ask(client: TestClient[Any, Any], step: Step, memory: Memory) -> Recorded:
    path, body = request_of(step, memory)
    headers = dict(step.headers)
    if body is not None:
        headers["Content-Type"] = "application/json"
    data = BytesIO(body) if body is not None else None
    async with client.request(step.method, path, data=data, headers=headers) as response:
        content = await response.read()
        return recorded(step, response.status, response.headers, content, memory)


def each(steps: Sequence[Step]) -> pytest.MarkDecorator:
    """Run a test for each step that a manager should answer as the engine did."""
    others = OF_THE_NODE | OF_LOOPS | DIFFERENCES.keys()
    return pytest.mark.parametrize("name", [step.name for step in steps if step.name not in others])


@pytest.fixture
def problems(answers: dict[str, Recorded], name: str) -> list[str]:
    """What Skep does otherwise in the step ``name``."""
    return differences(answers[name], recording("in_swarm")[name])


@each(script.DIALECT)
def test_paths_versions_and_filters_are_read_as_the_engine_reads_them(problems: list[str]) -> None:
    assert problems == []


@each(script.BAD_JSON)
def test_malformed_json_is_refused_in_the_engines_words(problems: list[str]) -> None:
    assert problems == []


@each(script.WRONG_TYPES)
def test_wrong_types_are_refused_in_the_engines_words(problems: list[str]) -> None:
    assert problems == []


@each(script.BAD_SPECS)
def test_services_that_can_never_work_are_refused_in_the_engines_words(problems: list[str]) -> None:
    assert problems == []


@each(script.ODD_SPECS)
def test_odd_specs_are_taken_or_refused_as_by_the_engine(problems: list[str]) -> None:
    assert problems == []


@each(script.FILES)
def test_secrets_and_configs_answer_as_the_engines_do(problems: list[str]) -> None:
    assert problems == []


@each(script.NETWORKS)
def test_networks_answer_as_the_engines_do(problems: list[str]) -> None:
    assert problems == []


@each(script.SERVICES)
def test_services_are_kept_and_shown_as_the_engine_does(problems: list[str]) -> None:
    assert problems == []


@each(script.UPDATES)
def test_updates_and_stale_versions_answer_as_the_engines_do(problems: list[str]) -> None:
    assert problems == []


@each(script.NODES)
def test_nodes_answer_as_the_engines_do(problems: list[str]) -> None:
    assert problems == []


@each(script.SWARM)
def test_the_swarm_answers_as_the_engines_does(problems: list[str]) -> None:
    assert problems == []


@each(script.REMOVALS)
def test_removals_and_what_is_in_use_answer_as_the_engines_do(problems: list[str]) -> None:
    assert problems == []


@each(script.AMBIGUOUS)
def test_an_ambiguous_beginning_of_an_id_is_refused_as_the_engine_does(problems: list[str]) -> None:
    assert problems == []


@each(script.LARGE)
def test_bodies_too_large_are_refused_as_the_engine_does(problems: list[str]) -> None:
    assert problems == []


def differences(response: Recorded, expected: Recorded) -> list[str]:
    """What ``answer`` does otherwise: its status, its message, its content type, the fields and specs of objects."""
    problems = []
    if response.status != expected.status:
        problems.append(f"status {response.status}, the engine has {expected.status} ({response.message})")
    elif response.message != expected.message:
        problems.append(f"says {response.message!r}, the engine {expected.message!r}")
    if expected.body is not None and response.headers.get("Content-Type") != expected.headers.get(
        "Content-Type"
    ):
        problems.append(f"content type {response.headers.get('Content-Type')}")
    problems += list(unlike(response.body, expected.body))
    return problems


_OTHERWISE = frozenset(
    {
        "Description",
        "Status",
        "ManagerStatus",
        "TLSInfo",
        "Endpoint",
        "Warnings",
        "JoinTokens",
        "IPAM",
        "Options",
    }
)
"""Fields whose contents depend on the machine, or on loops that do not run here; only that they exist counts."""


_LEADERS = frozenset({"UpdateStatus"})
"""Written by the leader's loops, which do not run here."""
_LATER = frozenset({"NoNewPrivileges", "Volumes"})
"""Always written since API 1.42 (Volumes) and 1.46; the recorded engine is older."""
_ADDED = frozenset({"Warnings"})
"""Skep warns of a service that no node can take, where the engine says nothing."""


def unlike(response: Any, expected: Any, place: str = "") -> list[str]:
    """Where two JSON values differ, apart from what depends on the machine."""
    if isinstance(expected, dict) and isinstance(response, dict):
        found = [f"{place} lacks {key}" for key in sorted(expected.keys() - response.keys() - _LEADERS)]
        found += [
            f"{place} has {key} besides"
            for key in sorted(response.keys() - expected.keys() - _LATER - _ADDED)
        ]
        for key in sorted((expected.keys() & response.keys()) - _OTHERWISE):
            found += unlike(response[key], expected[key], f"{place}.{key}")
        return found
    if isinstance(expected, list) and isinstance(response, list):
        if len(expected) != len(response):
            return [f"{place} has {len(response)} items, not {len(expected)}"]
        return [
            problem
            for index, (mine, theirs) in enumerate(zip(response, expected, strict=True))
            for problem in unlike(mine, theirs, f"{place}[{index}]")
        ]
    return [] if response == expected else [f"{place} is {response!r}, not {expected!r}"]


INTERFACES = {
    "lo": Interface(addresses=(ip_address("127.0.0.1"),), is_loopback=True),
    "eth0": Interface(addresses=(ip_address("10.77.0.1"),)),
}


@pytest.mark.parametrize(
    "step", [step for step in INITS if step.name not in DIFFERENCES], ids=lambda step: step.name
)
def test_an_init_or_join_is_refused_as_the_engine_does(step: Step) -> None:
    expected = recording("inits")[step.name]
    with pytest.raises(SkepError) as refusal:
        checked(step)
    assert (status_of(refusal.value), str(refusal.value)) == (expected.status, expected.message)


def checked(step: Step) -> object:
    """What the node process makes of the request."""
    body = request_of(step, Memory())[1] or b""
    if step.path.endswith("/init"):
        return founding(decode_body(body, InitRequest), INTERFACES)
    return joining(decode_body(body, JoinRequest), INTERFACES)


def test_the_documents_name_every_difference() -> None:
    text = (FOLDER.parents[1] / "docs" / "conformance.md").read_text()
    missing = [name for name in DIFFERENCES if f"`{name}`" not in text]
    assert not missing
