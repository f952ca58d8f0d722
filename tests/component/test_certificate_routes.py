"""Certificates in the API and in the command: what administrators see, and never a key."""

import json
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from skep.cli.cluster.certificate import shown_list
from skep.cli.output import Screen
from skep.manager.acme.records import ACCOUNT_ID, account_in, record_id, record_in
from skep.manager.acme.showing import certificate_families, certificate_warnings, expiring_soon
from skep.manager.acme.steps import AcmeFailed, OrderOpened
from skep.manager.acme.writing import begin_order, note_outcome
from skep.manager.control.validation.new_objects import known_task
from skep.manager.notify.problems import LastBackup, problems_of_cluster
from skep.manager.routes.access import ManagerApi
from skep.model.door.traffic import BUCKETS, RouteTraffic
from skep.model.options.notifications import Topic
from skep.model.service import Service, UpdateSplit, UpdateStatus
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS
from skep.store.interface import Transaction
from skep.store.kinds import write_record
from skep.store.level import LEVEL
from tests.component.test_users_on_a_manager import Rig, _a_rig
from tests.support.builders import a_service, a_task

DAY_NS = 86_400 * SECOND_NS
APP = "app.example.com"
AUTHORITY = {"Email": "ops@example.com", "Directory": "https://ca.example.com/dir", "AgreeTos": True}


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with _a_rig() as made:
        await made.api.store.update(write_services)
        yield made


def write_services(tx: Transaction) -> None:
    tx.raise_level(LEVEL)
    service = a_service("web")
    tx.put(replace(service, spec=replace(service.spec, labels={"skep.http": f"{APP}/shop"})))
    for id, tls in (("plain", "off"), ("own", "a-secret")):
        labels = {"skep.http": f"{id}.example.com", "skep.http.tls": tls}
        service = a_service(id)
        tx.put(replace(service, spec=replace(service.spec, name=id, labels=labels)))


async def fail(api: ManagerApi, reason: str, **fields: object) -> None:
    """Let the order of a name fail."""
    now_ns, account = api.clock.now_ns(), account_in(api.store.view())
    assert account is not None
    await api.store.update(begin_order, APP, "key", now_ns)
    known = replace(account, url="https://ca.example.com/account")
    failed = AcmeFailed(reason=reason, is_over=True, **fields)  # type: ignore[arg-type]
    await api.store.update(note_outcome, known, record_in(api.store.view(), APP), failed, now_ns, 0.5)


async def listed(rig: Rig) -> tuple[dict[str, object], list[str]]:
    status, text, _ = await rig.exchange("admin", "GET /skep/certificates")
    assert status == 200, text
    assert "KEY" not in text
    found = json.loads(text)
    return found, list(shown_list(found).lines(Screen()))


async def test_names_wait_for_an_authority_and_failures_are_shown(rig: Rig) -> None:
    _, lines = await listed(rig)
    assert len(lines) == 4  # hosts without TLS are not listed
    assert lines[1].split()[:2] == [APP, "wanted"]
    assert lines[2].split()[:4] == ["own.example.com", "failing", "secret", "a-secret"]
    assert "there is no secret a-secret" in lines[2]
    assert "skep door acme" in lines[-1]
    status, text, _ = await rig.exchange("admin", "POST /skep/certificates/authority", AUTHORITY)
    assert status == 204, text
    await fail(rig.api, "no such host")
    found, lines = await listed(rig)
    assert found["Authority"]["Directory"] == AUTHORITY["Directory"]  # type: ignore[index]
    assert lines[1].split()[:2] == [APP, "failing"]
    assert "no such host" in lines[1]


async def test_an_order_shows_its_step(rig: Rig) -> None:
    api = rig.api
    await rig.exchange("admin", "POST /skep/certificates/authority", AUTHORITY)
    account = account_in(api.store.view())
    assert account is not None
    known = replace(account, url="https://ca.example.com/account")

    async def step() -> str:
        _, lines = await listed(rig)
        return lines[1].partition("ACME")[0].removeprefix(APP).strip()

    assert await step() == "wanted"
    await api.store.update(begin_order, APP, "key", api.clock.now_ns())
    assert await step() == "ordering: not sent yet"
    for opened, words in (
        (OrderOpened(url="https://ca/1"), "waiting for the certificate"),
        (OrderOpened(url="https://ca/1", challenges={"token": "text"}), "waiting for the challenge"),
        (OrderOpened(url="https://ca/1", dns={"name": "text"}), "waiting for the challenge in DNS"),
    ):
        record = record_in(api.store.view(), APP)
        await api.store.update(note_outcome, known, record, opened, api.clock.now_ns(), 0.5)
        assert await step() == f"ordering: {words}"


async def test_routes_have_their_requests_and_the_share_of_new_tasks() -> None:
    def staged(tx: Transaction) -> None:
        service = tx.get(Service, ServiceId("web"))
        status = UpdateStatus(split=UpdateSplit(percent=5, versions=(2,)))
        labels = {**service.spec.labels, STACK_LABEL: "shop"}
        tx.put(replace(service, update_status=status, spec=replace(service.spec, labels=labels)))

    fast = (0, 90, *[0] * (BUCKETS - 3), 10)
    counted = RouteTraffic(
        service_id=ServiceId("web"), route=f"{APP}/shop", seconds=50.0, requests=100, errors=2, buckets=fast
    )

    async def collect() -> list[RouteTraffic]:
        return [counted]

    async with _a_rig(collect_routes=collect) as rig:
        await rig.api.store.update(write_services)
        await rig.api.store.update(staged)
        status, text, _ = await rig.exchange("admin", "GET /skep/door")
        assert status == 200, text
        routes = {one["Route"]: one for one in json.loads(text)}
        assert routes.keys() == {f"{APP}/shop", "plain.example.com", "own.example.com"}
        web = routes[f"{APP}/shop"]
        assert (web["RequestsPerSecond"], web["ErrorPercent"], web["NewPercent"]) == (2.0, 2.0, 5)
        assert (web["LatencyP50"], web["LatencyP99"]) == (pytest.approx(7.78, abs=0.01), 10_000.0)
        assert "skep door up" in web["Problem"]
        assert "RequestsPerSecond" not in routes["plain.example.com"]
        _, text, _ = await rig.exchange("viewer:shop", "GET /skep/door")
        assert [one["Route"] for one in json.loads(text)] == [f"{APP}/shop"]


async def test_a_renewal_is_ordered_at_once_unless_the_authority_forbids_it(rig: Rig) -> None:
    renew = f"POST /skep/certificates/{APP}/renew"
    status, text, _ = await rig.exchange("admin", renew)
    assert (status, "skep door acme" in text) == (400, True)
    await rig.exchange("admin", "POST /skep/certificates/authority", AUTHORITY)
    status, text, _ = await rig.exchange("admin", renew)
    assert status == 404
    await fail(rig.api, "no such host")
    assert (await rig.exchange("admin", renew))[0] == 204
    assert record_in(rig.api.store.view(), APP).is_asked
    await fail(rig.api, "too many", retry_after_s=7200.0)
    status, text, _ = await rig.exchange("admin", renew)
    assert (status, "too many" in text) == (400, True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"Email": "ops"}, "mail address"),
        ({"Directory": "http://ca.example.com/dir"}, "https://"),
        ({"Directory": "https://user@ca.example.com/dir"}, "https://"),
        ({"Roots": "no certificate"}, "PEM"),
    ],
)
async def test_an_invalid_authority_is_refused(rig: Rig, fields: dict[str, str], words: str) -> None:
    status, text, _ = await rig.exchange(
        "admin", "POST /skep/certificates/authority", {**AUTHORITY, **fields}
    )
    assert (status, words in text) == (400, True), text


async def test_terms_are_read_unless_they_were_agreed_to(rig: Rig) -> None:
    body = {**AUTHORITY, "Directory": "https://127.0.0.1:1/dir", "AgreeTos": False}
    status, text, _ = await rig.exchange("admin", "POST /skep/certificates/authority", body)
    assert (status, "cannot be reached" in text) == (503, True), text
    assert account_in(rig.api.store.view()) is None


async def test_users_below_administrator_see_nothing(rig: Rig) -> None:
    for request, body in (
        ("GET /skep/certificates", None),
        (f"POST /skep/certificates/{APP}/renew", None),
        ("POST /skep/certificates/authority", AUTHORITY),
    ):
        assert (await rig.exchange("operator", request, body))[0] == 403


async def test_users_below_administrator_reach_no_container_with_keys(rig: Rig) -> None:
    door = a_service("door")
    door = replace(door, spec=replace(door.spec, name="door", labels={"skep.door": "true"}))
    task = replace(a_task("door1"), service_id=door.id)
    await rig.api.store.update(lambda tx: [tx.put(door), tx.put(task)])
    assert "skep.door" in known_task(rig.api.store.view(), task).machine_rights


async def test_a_certificate_that_is_not_renewed_is_a_problem_a_warning_and_a_metric(rig: Rig) -> None:
    await rig.exchange("admin", "POST /skep/certificates/authority", AUTHORITY)
    await fail(rig.api, "no such host")
    now_ns = rig.api.clock.now_ns()

    async def expire(days: float) -> None:
        not_after_ns = now_ns + int(days * DAY_NS)
        record = replace(
            record_in(rig.api.store.view(), APP),
            pem="chain and key",
            not_before_ns=not_after_ns - 90 * DAY_NS,
            not_after_ns=not_after_ns,
        )
        await rig.api.store.update(write_record, record_id(APP), record)

    def expires() -> list[str]:
        return [name for name, _ in expiring_soon(rig.api.store.view(), now_ns) if name == APP]

    await expire(31)
    assert expires() == []
    await expire(29)  # the last attempt has failed, and renewals begin when a third is left
    assert expires() == [APP]

    def forget_errors(tx: Transaction) -> None:
        write_record(tx, record_id(APP), replace(record_in(tx, APP), error=""))
        account = account_in(tx)
        assert account is not None
        write_record(tx, ACCOUNT_ID, replace(account, error=""))

    await rig.api.store.update(forget_errors)
    assert expires() == []
    await fail(rig.api, "no such host")
    await expire(14)
    view = rig.api.store.view()
    [warning] = certificate_warnings(view, now_ns)
    assert APP not in warning
    problems = problems_of_cluster(view, LastBackup(complete_ns=now_ns), now_ns, now_ns)
    [problem] = [one for one in problems if one.topic is Topic.CERTIFICATE and one.subject == APP]
    assert "expires on" in problem.message
    assert "no such host" in problem.message
    expiries, starts, failures = certificate_families(view)
    assert [sample.value for sample in failures.samples] == [2]
    assert [sample.value for sample in expiries.samples] == [(now_ns + 14 * DAY_NS) / SECOND_NS]
    assert [sample.value for sample in starts.samples] == [(now_ns - 76 * DAY_NS) / SECOND_NS]
    await expire(-1)
    sentence = dict(expiring_soon(rig.api.store.view(), now_ns))[APP]
    assert "expired on" in sentence
