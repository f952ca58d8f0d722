"""A manager of an earlier commit answers with other names, as recorded here, and the commands understand it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
import pytest
from msgspec.structs import fields

from skep.api.client.requests import Filters, Requests
from skep.cli.cluster.recover import check
from skep.cli.see.explain import about_service, about_task
from skep.cli.see.quorum import no_leader, quorum_of, way_out
from skep.errors import FailedPrecondition
from skep.manager.diagnosis.explanations import ServiceExplanation, TaskExplanation
from skep.manager.quorum import Quorum
from skep.manager.routes.extensions.maintenance import ShownEviction
from skep.manager.scheduler.explaining.dry_run import PlannedPlacement
from skep.stack.planning import PredictedPlacement

ANSWERS: dict[str, Any] = json.loads(
    Path(__file__).with_name("answers_of_an_earlier_commit.json").read_text()
)
TYPES: Mapping[str, Any] = {
    "/skep/services/web/explain": ServiceExplanation,
    "/skep/services/s1/explain": ServiceExplanation,
    "/skep/services/s2/explain": ServiceExplanation,
    "/skep/tasks/t2/explain": TaskExplanation,
    "/skep/quorum": Quorum,
    "/skep/services/placement": tuple[PlannedPlacement, ...],
    "/skep/cluster/evict": ShownEviction,
}


class Earlier(Requests):
    """A manager of an earlier commit."""

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        return ANSWERS[path]


def unknown_fields(value: Any, kind: Any, at: str = "") -> Iterator[str]:
    """Fields of a response that its present type does not have."""
    if get_origin(kind) in (UnionType, Union):
        kind = next(one for one in get_args(kind) if one is not type(None))
    if isinstance(value, list):
        for one in value:
            yield from unknown_fields(one, get_args(kind)[0], at)
    elif isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        known = {one.encode_name: one.type for one in fields(kind)}
        for name, one in value.items():
            if name not in known:
                yield f"{at}.{name}"
            else:
                yield from unknown_fields(one, known[name], f"{at}.{name}")


@pytest.mark.parametrize("path", ANSWERS)
async def test_every_field_of_an_earlier_answer_has_its_present_name(path: str) -> None:
    assert list(unknown_fields(ANSWERS[path], TYPES[path])), "the recorded answer has former names"
    client = Earlier()
    found = await (client.post(path) if path.endswith("placement") else client.get(path))
    assert not list(unknown_fields(found, TYPES[path]))


async def test_present_answers_stay_as_they_are() -> None:
    class Present(Earlier):
        async def request(self, *_: Any, **__: Any) -> Any:
            return {"IsHealthy": True, "IsAsWanted": False, "Desired": 2, "Wanted": 1}

    assert await Present().get("/skep/services/web/explain") == {"IsHealthy": True, "Desired": 2}
    assert (await Present().get("/services/web"))["Wanted"] == 1, "a response of Docker's API is not changed"


async def test_the_commands_understand_an_earlier_manager() -> None:
    client = Earlier()
    explained = await client.get("/skep/services/web/explain")
    assert "no suitable node" in "\n".join(about_service("web", explained, 0.0))
    assert "all 2 nodes: suitable" in "\n".join(
        about_task("t2", await client.get("/skep/tasks/t2/explain"), 0.0)
    )
    quorum = await quorum_of(client)
    assert quorum is not None
    assert "1 of 3 managers responds (m2, m3 do not)" in next(iter(no_leader(quorum)))
    assert way_out(quorum) == "skep cluster recover --dry-run"
    with pytest.raises(FailedPrecondition, match="nothing to recover"):
        check({"Swarm": {"LocalNodeState": "active"}}, {**quorum, "HasLeader": True})
    check({"Swarm": {"LocalNodeState": "active"}}, quorum)
    placements = msgspec.convert(
        await client.post("/skep/services/placement"), tuple[PredictedPlacement, ...]
    )
    assert placements[0].error.startswith("no suitable node")
