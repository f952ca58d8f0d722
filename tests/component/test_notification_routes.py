"""Targets of notifications in the API: for administrators only, and never with their credentials."""

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from aiohttp import ClientError
from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.api.backups import BackupRequest, Sealer, new_header, opening
from skep.cli.endpoint import HostOptions
from skep.cli.maintain.backup import _backup
from skep.errors import Unavailable
from skep.manager.notify.incidents import IncidentChanges
from skep.manager.notify.problems import Problem
from skep.manager.notify.records import Target, backup_in, delivery_in, targets_in
from skep.manager.notify.showing import delivery_families, delivery_warnings
from skep.manager.notify.writing import add_target, claim, settle, write_changes
from skep.manager.routes import application
from skep.manager.routes.access import ManagerApi
from skep.manager.routes.warnings import warnings_of
from skep.model.options.notifications import Topic
from skep.store.interface import Transaction
from skep.store.level import LEVEL, NOTIFICATIONS
from tests.component.test_notification_targets import a_receiver
from tests.component.test_users_on_a_manager import Rig, _a_rig
from tests.conformance.manager import a_manager_api

SECRET = "hush-hush"


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with _a_rig() as made:
        await made.api.store.update(raise_level, LEVEL)
        yield made


def raise_level(tx: Transaction, level: int) -> None:
    tx.raise_level(level)


def a_body(url: str, **fields: object) -> dict[str, object]:
    return {"Name": "ops", "URL": url, "Secret": SECRET, **fields}


async def fail(api: ManagerApi, reason: str) -> None:
    """Let the leader fail to send a first message to the first target."""
    [target], now_ns = targets_in(api.store.view()), api.clock.now_ns()
    problem = Problem(key="node/n1", topic=Topic.NODE, message="node n1 is down")
    await api.store.update(write_changes, IncidentChanges(began=(problem,)), now_ns)
    await api.store.update(claim, target, now_ns)
    await api.store.update(settle, target, 1, reason, now_ns, 0.5)


async def test_a_target_is_added_tested_listed_and_removed(rig: Rig) -> None:
    async with a_receiver() as receiver:
        url = receiver.url
        status, text, _ = await rig.exchange(
            "admin", "POST /skep/notify/create", a_body(url, On=["node"], AllowInternal=True)
        )
        assert status == 201, text
        status, text, _ = await rig.exchange("admin", "POST /skep/notify/ops/test")
        assert status == 200, text
        assert json.loads(receiver.requests[0][3])["Test"] is True
        status, listed, _ = await rig.exchange("admin", "GET /skep/notify")
        [shown] = json.loads(listed)
        assert (shown["Name"], shown["Kind"], shown["On"], shown["HasSecret"]) == (
            "ops",
            "webhook",
            ["node"],
            True,
        )
        assert SECRET not in text + listed
        assert "path-key" not in text + listed
        assert (await rig.exchange("admin", "POST /skep/notify/create", a_body(url, AllowInternal=True)))[
            0
        ] == 409
    assert SECRET not in repr(rig.journal.entries)
    assert (await rig.exchange("admin", "DELETE /skep/notify/ops"))[0] == 204
    assert (await rig.exchange("admin", "DELETE /skep/notify/ops"))[0] == 404
    assert (await rig.exchange("admin", "POST /skep/notify/ops/test"))[0] == 404


@pytest.mark.parametrize("role", ["viewer", "operator", "operator:shop"])
async def test_only_administrators_see_and_change_targets(rig: Rig, role: str) -> None:
    for request in (
        "GET /skep/notify",
        "POST /skep/notify/create",
        "POST /skep/notify/ops/test",
        "DELETE /skep/notify/ops",
    ):
        assert (await rig.exchange(role, request, {}))[0] == 403, request


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"Name": ""}, "name must be provided"),
        ({"Name": "../x"}, "invalid name"),
        ({"URL": "ftp://example.org/"}, "unknown scheme"),
        ({"URL": "slack+https://example.org/"}, "leave out --secret"),
        ({"URL": "http://localhost:8080/"}, "127.0.0.1 is an address of this machine, which needs --allow-"),
        ({"URL": "https://[::1]/"}, "::1 is an address of this machine, which needs --allow-internal"),
        ({"URL": "smtps://169.254.169.254?from=a@b.org&to=c@d.org", "Secret": ""}, "is a link-local address"),
        ({"On": ["weather"]}, "weather"),
        ({"On": ["disk"], "Stacks": ["shop"]}, "no stack has problems of the topic disk"),
    ],
)
async def test_a_target_that_cannot_work_is_refused(rig: Rig, fields: dict[str, object], reason: str) -> None:
    body = a_body("https://example.org/") | fields
    status, text, _ = await rig.exchange("admin", "POST /skep/notify/create", body)
    assert status == 400
    assert reason in text
    assert SECRET not in text


async def test_the_number_of_targets_is_bounded(rig: Rig) -> None:
    statuses = [
        (
            await rig.exchange(
                "admin", "POST /skep/notify/create", a_body("https://e.org/", Name=f"t{number}")
            )
        )[0]
        for number in range(17)
    ]
    assert statuses == [201] * 16 + [400]


async def test_a_test_of_an_internal_target_shows_the_reason(rig: Rig) -> None:
    async with a_receiver() as receiver:
        await rig.api.store.update(add_target, Target(id="t1", name="ops", url=receiver.url))
        status, text, _ = await rig.exchange("admin", "POST /skep/notify/ops/test")
    assert status == 400
    assert "127.0.0.1 is an address of this machine, which needs --allow-internal" in text
    assert receiver.requests == []


async def test_a_target_that_fails_is_a_warning_a_metric_and_in_the_list(rig: Rig) -> None:
    await rig.exchange("admin", "POST /skep/notify/create", a_body("https://example.org/path-key"))
    assert list(delivery_warnings(rig.api.store.view())) == []
    await fail(rig.api, "it responded 503")
    view = rig.api.store.view()
    [warning] = delivery_warnings(view)
    assert warning.startswith("WARNING: notifications to ops fail since ")
    assert warning.endswith(" UTC: it responded 503 (skep notify ls)")
    [shown] = json.loads((await rig.exchange("admin", "GET /skep/notify"))[1])
    assert (shown["Error"], shown["Waiting"], shown["Failed"]) == ("it responded 503", 1, 1)
    samples = {family.name: [one.value for one in family.samples] for family in delivery_families(view)}
    assert samples["skep_notify_failures_total"] == [1]
    assert samples["skep_notify_waiting"] == [1]


async def test_older_managers_get_no_targets(rig: Rig) -> None:
    async with _a_rig() as older:
        await older.api.store.update(raise_level, NOTIFICATIONS - 1)
        status, text, _ = await older.exchange(
            "admin", "POST /skep/notify/create", a_body("https://example.org/")
        )
        assert status == 400
        assert "upgrade the others first" in text


async def test_a_target_added_again_under_its_name_starts_over(rig: Rig) -> None:
    for _ in range(2):
        await rig.exchange("admin", "POST /skep/notify/create", a_body("https://example.org/"))
        [target] = targets_in(rig.api.store.view())
        assert delivery_in(rig.api.store.view(), target) is None
        await fail(rig.api, "it responded 503")
        await rig.exchange("admin", "DELETE /skep/notify/ops")


class Backing:
    """Creates backups of one piece, or fails after it."""

    def __init__(self, error: str = "") -> None:
        self._error = error

    def check(self) -> None:
        pass

    def begin(self, request: BackupRequest) -> Sealer:
        return Sealer(request.header, request.key)

    async def pieces(self, sealer: Sealer) -> AsyncIterator[bytes]:
        yield sealer.end()
        if self._error:
            raise Unavailable(self._error)


@pytest.mark.parametrize("error", ["", "the key of the cluster's store is being replaced"])
async def test_the_end_of_a_backup_is_recorded(error: str) -> None:
    async with a_manager_api() as api:
        await api.store.update(raise_level, LEVEL)
        body = BackupRequest(header=new_header("hkdf"), key=bytes(32))
        async with TestClient(TestServer(application(replace(api, backups=Backing(error))))) as client:
            with suppress(ClientError):
                response = await client.post("/skep/backup", data=msgspec.json.encode(body))
                assert response.status == 200
                await response.read()
            last = backup_in(api.store.view())
    assert (last.complete_ns > 0, last.failed_ns > 0, last.error) == (not error, bool(error), error)


class Ending(Backing):
    """Begins a backup, and fails."""

    def begin(self, request: BackupRequest) -> Sealer:
        self._opening = opening(request.header)
        return super().begin(request)

    async def pieces(self, sealer: Sealer) -> AsyncIterator[bytes]:
        yield self._opening
        raise Unavailable(self._error)


async def test_a_backup_that_its_manager_ends_early_leads_to_the_reason(tmp_path: Path) -> None:
    error = "the key of the cluster's store is being replaced: run the backup again"
    async with a_manager_api() as api:
        await api.store.update(raise_level, LEVEL)
        async with TestServer(application(replace(api, backups=Ending(error)))) as server:
            host = HostOptions(host=f"tcp://127.0.0.1:{server.port}")
            with pytest.raises(Unavailable, match=r"before it was complete\. Run skep status to see why"):
                await _backup(host, tmp_path / "swarm.backup", ("hkdf", bytes(32)))
        warnings = await warnings_of(api.store, api.clock.now_ns())
    assert [one.partition(" UTC ")[2] for one in warnings] == [f"failed: {error} (skep backup)"]
    assert list(tmp_path.iterdir()) == []
