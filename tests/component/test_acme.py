"""Certificates from a real authority (Pebble), by the leader's loop on a store in memory."""

import asyncio
import shutil
from collections.abc import Coroutine
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from msgspec.structs import replace

from skep.manager.acme.calls import AuthorityCalls
from skep.manager.acme.dns_hook import DnsHook
from skep.manager.acme.records import (
    AcmeAccount,
    HostCertificate,
    challenges_in,
)
from skep.manager.acme.steps import ASK_S, FIRST_AWAY_S, LIMITED_S, OrderPending, Outcome
from skep.manager.acme.writing import ask_for_renewal, configure
from skep.model.values.times import SECOND_NS, timestamp
from skep.security.keys import load_private_key
from tests.support.security.acme_rig import APP, CLOCK, a_rig
from tests.support.security.pebble import a_zone

pytestmark = [
    pytest.mark.skipif(shutil.which("pebble") is None, reason="pebble is not installed"),
    pytest.mark.timeout(120),
]


async def first_of(*waits: Coroutine[None, None, object]) -> None:
    """Wait until one of them has happened."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def test_a_name_gets_a_certificate_with_its_key(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig, rig.leading():
        await rig.until(lambda: bool(rig.record().pem))
        [served] = rig.certificates().items()
    name, pem = served
    assert name == APP
    leaf, *chain = x509.load_pem_x509_certificates(pem.encode())
    assert chain
    assert pem.index("PRIVATE KEY") > pem.rindex("END CERTIFICATE")  # the order that HAProxy reads
    assert load_private_key(pem[pem.rindex("-----BEGIN") :].encode()).public_key() == leaf.public_key()
    record = rig.record()
    assert record.order is None
    assert challenges_in({name: record}) == {}
    life_ns = record.not_after_ns - record.not_before_ns
    assert record.not_after_ns - record.renew_at_ns >= life_ns // 3
    assert rig.front.counts["order-plz"] == 1


async def test_a_certificate_is_renewed_when_a_third_of_its_life_is_left(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig, rig.leading():
        await rig.until(lambda: bool(rig.record().pem))
        first = rig.record()
        await rig.change(APP, renew_at_ns=CLOCK.now_ns() + SECOND_NS // 2, retry_at_ns=0)
        await rig.until(lambda: rig.record().pem not in ("", first.pem))
        assert rig.front.counts["order-plz"] == 2
        assert rig.record().pem.split("PRIVATE KEY")[1] != first.pem.split("PRIVATE KEY")[1]


@pytest.mark.parametrize(
    ("status", "retry_after", "asked_after_s"),
    [(200, "7200", 7200), (500, "7200", ASK_S), (200, str(10**15), ASK_S)],
)
async def test_the_authority_is_asked_when_to_renew(
    tmp_path: Path, status: int, retry_after: str, asked_after_s: float
) -> None:
    """Debian's Pebble has no renewal windows, so the front has them."""
    starts_at = CLOCK.now_ns() + 100 * 86_400 * SECOND_NS

    async with a_rig(tmp_path) as rig:
        base = rig.front.directory.removesuffix("/dir")
        paths = {"newNonce": "nonce-plz", "newAccount": "sign-me-up", "newOrder": "order-plz"}
        directory = {name: f"{base}/{path}" for name, path in {**paths, "renewalInfo": "window"}.items()}

        def with_windows(kind: str) -> web.Response | None:
            window = {"start": timestamp(starts_at), "end": timestamp(starts_at + 3600 * SECOND_NS)}
            if kind == "window":
                body = {"suggestedWindow": window}
                return web.json_response(body, status=status, headers={"Retry-After": retry_after})
            return web.json_response(directory) if kind == "dir" else None

        rig.front.spoil = with_windows
        async with rig.leading():
            await rig.until(lambda: rig.record().ask_at_ns > 0)
        record, now_ns = rig.record(), CLOCK.now_ns()
        is_suggested = starts_at <= record.renew_at_ns <= starts_at + 3600 * SECOND_NS
        assert is_suggested == (asked_after_s == 7200)
        asked_again_s = (record.ask_at_ns - now_ns) / SECOND_NS
        assert abs(asked_again_s - asked_after_s) < 60
        assert rig.front.counts["window"] == 1
        assert not rig.account.error
        assert not record.error


async def test_a_user_can_ask_for_a_renewal(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig, rig.leading():
        await rig.until(lambda: bool(rig.record().pem))
        first = rig.record()
        await rig.store.update(ask_for_renewal, APP, CLOCK.now_ns())
        await rig.until(lambda: rig.record().pem != first.pem)
        assert not rig.record().is_asked


async def test_refused_nonces_cost_requests_but_no_order(tmp_path: Path) -> None:
    async with a_rig(tmp_path, PEBBLE_WFE_NONCEREJECT="40") as rig, rig.leading():
        await rig.until(lambda: bool(rig.record().pem))
    assert rig.record().failures == 0


async def test_a_failed_validation_is_shown_and_tried_again_later(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig, rig.leading():
        served, rig.front.challenges = rig.front.challenges, dict
        await rig.until(lambda: bool(rig.record().error))
        record = rig.record()
        assert "404" in record.error
        assert record.order is None
        assert record.retry_at_ns - CLOCK.now_ns() > 170 * SECOND_NS
        assert rig.account.error == ""
        rig.front.challenges = served
        await rig.store.update(ask_for_renewal, APP, CLOCK.now_ns())
        await rig.until(lambda: bool(rig.record().pem))
        assert rig.record().error == ""


async def test_a_failing_name_does_not_keep_others_waiting(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig:
        rig.wanted = ("bad.example.com", "*.wild.example.com", APP)
        served = rig.front.challenges
        rig.front.challenges = lambda: (
            {} if (order := rig.record("bad.example.com").order) and order.url else served()
        )
        async with rig.leading():
            await rig.until(lambda: bool(rig.record().pem) and bool(rig.record("bad.example.com").error))
            await rig.until(lambda: "DNS-01" in rig.record("*.wild.example.com").error)


async def test_a_leader_that_dies_after_every_step_orders_once(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig:
        made, leaders = rig.run_step, 0

        async def once(account: AcmeAccount, record: HostCertificate | None) -> Outcome:
            if rig.store.view().revision != first:
                died.set()
                await asyncio.Event().wait()
            outcome = await made(account, record)
            if isinstance(outcome, OrderPending):  # the only result that is not stored
                died.set()
                await asyncio.Event().wait()
            return outcome

        rig.run_step = once
        while not rig.record().pem:
            died, first = asyncio.Event(), rig.store.view().revision
            async with rig.leading():
                await first_of(died.wait(), rig.until(lambda: bool(rig.record().pem)))
            leaders += 1
        assert leaders >= 4
    assert rig.front.counts["order-plz"] == 1
    assert rig.front.counts["finalize-order"] == 1
    assert rig.record().failures == 0


async def test_a_leader_that_dies_before_it_records_a_step_loses_nothing(tmp_path: Path) -> None:
    """Each kind of result is lost once, after the authority has done its part."""
    async with a_rig(tmp_path) as rig:
        lost: set[str] = set()
        made = rig.run_step

        async def dying(account: AcmeAccount, record: HostCertificate | None) -> Outcome:
            outcome = await made(account, record)
            if (kind := type(outcome).__name__) not in lost:
                lost.add(kind)
                died.set()
                await asyncio.Event().wait()
            return outcome

        rig.run_step = dying
        while not rig.record().pem:
            died = asyncio.Event()
            async with rig.leading():
                await first_of(died.wait(), rig.until(lambda: bool(rig.record().pem)))
        assert lost == {"AccountRegistered", "OrderOpened", "OrderPending", "CertificateIssued"}
    # Only the order whose address got lost is repeated, and nothing is issued twice.
    assert rig.front.counts["order-plz"] == 2
    assert rig.front.counts["finalize-order"] == 1


@pytest.mark.parametrize(("header", "least_s"), [("7200", 7200.0), ("", LIMITED_S)])
async def test_a_limit_of_the_authority_is_respected_even_if_a_user_asks(
    tmp_path: Path, header: str, least_s: float
) -> None:
    def limited(kind: str) -> web.Response | None:
        if kind != "order-plz":
            return None
        problem = {"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many certificates"}
        headers = {"Retry-After": header} if header else {}
        return web.json_response(
            problem, status=429, headers=headers, content_type="application/problem+json"
        )

    async with a_rig(tmp_path) as rig, rig.leading():
        rig.front.spoil = limited
        await rig.until(lambda: bool(rig.record().error))
        record = rig.record()
        assert "too many certificates" in record.error
        assert record.blocked_until_ns - CLOCK.now_ns() > (least_s - 60) * SECOND_NS
        with pytest.raises(Exception, match="too many certificates"):
            await rig.store.update(ask_for_renewal, APP, CLOCK.now_ns())
        assert rig.front.counts["order-plz"] == 1
        assert rig.account.error == ""


async def test_an_authority_that_is_away_keeps_the_order(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig, rig.leading():
        await rig.until(lambda: (order := rig.record().order) is not None and bool(order.url))
        rig.front.is_away = True
        await rig.until(lambda: bool(rig.account.error))
        account, record = rig.account, rig.record()
        assert "cannot be reached" in account.error
        assert account.retry_at_ns - CLOCK.now_ns() > (FIRST_AWAY_S - 5) * SECOND_NS
        assert record.order is not None
        assert record.failures == 0
        rig.front.is_away = False
        await rig.store.update(configure, replace(account, retry_at_ns=0))
        await rig.until(lambda: bool(rig.record().pem))
        assert rig.front.counts["order-plz"] == 1
        assert rig.account.error == ""


async def test_an_untrusted_authority_is_named(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig:
        account = replace(rig.account, roots="")
        await rig.store.update(configure, account)
        async with rig.leading():
            await rig.until(lambda: "not trusted" in rig.account.error)


async def test_a_response_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig, rig.leading():
        rig.front.spoil = lambda kind: web.Response(body=b" " * 300_000) if kind == "dir" else None
        await rig.until(lambda: "too long" in rig.account.error)


async def test_an_account_that_the_authority_forgot_is_registered_again(tmp_path: Path) -> None:
    def forgetful(kind: str) -> web.Response | None:
        if kind != "order-plz" or rig.front.counts[kind] > 1:
            return None
        problem = {"type": "urn:ietf:params:acme:error:accountDoesNotExist", "detail": "no account"}
        return web.json_response(problem, status=400, content_type="application/problem+json")

    async with a_rig(tmp_path) as rig, rig.leading():
        rig.front.spoil = forgetful
        await rig.until(lambda: "no account" in rig.account.error)
        assert rig.account.url == ""
        await rig.store.update(configure, replace(rig.account, retry_at_ns=0))
        await rig.until(lambda: bool(rig.record().pem))
    assert rig.front.counts["sign-me-up"] >= 2
    assert rig.account.error == ""


async def test_another_email_is_sent_to_the_same_account(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig, rig.leading():
        await rig.until(lambda: bool(rig.account.url))
        before = rig.account
        await rig.store.update(configure, replace(before, email="other@example.com", key="another"))
        await rig.until(lambda: bool(rig.account.url) and len(rig.outcomes) > 1)
        assert (rig.account.url, rig.account.key) == (before.url, before.key)
        assert rig.front.counts["my-account"] >= 1


@pytest.mark.needs("root")
async def test_a_wildcard_is_validated_by_the_administrators_program(tmp_path: Path) -> None:
    with a_zone(tmp_path) as (names_at, program):
        async with a_rig(tmp_path, names_at=names_at) as rig:
            rig.wanted = ("*.wild.example.com",)
            rig.run_step = AuthorityCalls(DnsHook(str(program))).run_step
            async with rig.leading():
                await rig.until(lambda: bool(rig.record("*.wild.example.com").pem))
                await rig.until(lambda: not rig.record("*.wild.example.com").left)
    [pem] = rig.certificates().values()
    names = x509.load_pem_x509_certificate(pem.encode()).extensions
    assert names.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DNSName
    ) == ["*.wild.example.com"]
    runs = (tmp_path / "dns-hook.log").read_text().splitlines()
    assert runs == [f"{one} _acme-challenge.wild.example.com" for one in ("set", "remove")]
