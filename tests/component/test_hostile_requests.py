"""Requests whose words are no numbers, times or encodings: each is refused, and none is a failure of ours."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from skep.model.service import Service
from tests.support.clients.command_rig import Cluster, a_cluster
from tests.support.clients.raw_calls import Answered, connected, received

DIGITS = "9" * 400


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with a_cluster(tmp_path) as made:
        yield made


async def ask(cluster: Cluster, request: str, headers: bytes = b"", body: object = None) -> Answered:
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{request} HTTP/1.1\r\nHost: skep\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"

    def sent() -> Answered:
        with closing(connected(str(cluster.folder / "api.sock"))) as connection:
            connection.sendall(head.encode() + headers + b"\r\n" + content)
            return received(connection)

    return await asyncio.to_thread(sent)


def a_spec(name: str, **labels: str) -> dict[str, object]:
    return {"Name": name, "Labels": labels, "TaskTemplate": {"ContainerSpec": {"Image": "busybox"}}}


def filtered(**values: str) -> str:
    return json.dumps({key: [value] for key, value in values.items()}, separators=(",", ":")).replace(
        "+", "%2B"
    )


@pytest.mark.parametrize(
    ("request_line", "headers", "body"),
    [
        *(
            ("POST /services/create", b"", a_spec("web", **{label: f"{DIGITS}s"}))
            for label in (
                "skep.drain",
                "skep.on-disconnect-delay",
                "skep.progress-deadline",
                "skep.job-ttl",
            )
        ),
        ("POST /services/create", b"X-Registry-Auth: \xff\r\n", a_spec("web")),
        (f"POST /networks/prune?filters={filtered(until=DIGITS + 's')}", b"", None),
        (f"POST /networks/prune?filters={filtered(until='0001-01-01T00:00:00+01:00')}", b"", None),
        (f"GET /skep/history?since={DIGITS}h", b"", None),
        ("GET /skep/history?since=9999-12-31T23:59:59-01:00", b"", None),
        ("GET /skep/history?limit=%C2%B2", b"", None),
        (f"POST /services/web/update?version={DIGITS * 20}", b"", a_spec("web")),
    ],
)
async def test_it_is_refused(
    cluster: Cluster, request_line: str, headers: bytes, body: dict[str, object] | None
) -> None:
    answered = await ask(cluster, request_line, headers, body)
    assert answered.status == 400, answered
    assert answered.document["message"]
    assert cluster.names() == []


@pytest.mark.parametrize("label", ["heartbeat-grace", "forget-nodes", "renew-window"])
async def test_a_setting_of_the_cluster_is_refused(cluster: Cluster, label: str) -> None:
    swarm = (await ask(cluster, "GET /swarm")).document
    spec = {**swarm["Spec"], "Labels": {f"skep.{label}": f"{DIGITS}h"}}
    answered = await ask(cluster, f"POST /swarm/update?version={swarm['Version']['Index']}", b"", spec)
    assert (answered.status, f"skep.{label}" in answered.document["message"]) == (400, True), answered


async def test_of_many_changes_only_the_bad_one_is_refused(cluster: Cluster) -> None:
    body = [{"Spec": a_spec("good")}, {"Spec": a_spec("bad", **{"skep.drain": f"{DIGITS}s"})}]
    answered = await ask(cluster, "POST /skep/services/changes", b"", body)
    assert [bool(one.get("Error")) for one in answered.document] == [False, True]
    assert [one.spec.name for one in cluster.store.view().find(Service)] == ["good"]
