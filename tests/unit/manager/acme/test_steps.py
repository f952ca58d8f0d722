"""Decisions about certificates, over weeks and months of supposed time."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.acme.records import NAMES_MAX, RECORDS_MAX, AcmeAccount, CertificateOrder, HostCertificate
from skep.manager.acme.steps import (
    ASK_S,
    LONGEST_AWAY_S,
    PUBLISH_S,
    AccountRegistered,
    AcmeFailed,
    AskWindow,
    BeginOrder,
    CertificateIssued,
    ContinueOrder,
    DropOrder,
    OpenOrder,
    OrderOpened,
    OrderPending,
    Outcome,
    RecordsRemoved,
    RegisterAccount,
    RemoveRecords,
    Step,
    WaitUntil,
    Wanted,
    WindowKnown,
    after_account,
    after_step,
    begun,
    considered_names,
    dropped,
    next_step,
    present_record,
)
from skep.model.values.times import SECOND_NS

HOUR_NS = 3600 * SECOND_NS
DAY_NS = 24 * HOUR_NS
NOW_NS = 1_800_000_000 * SECOND_NS
LIFE_NS = 90 * DAY_NS
A, B = "a.example.com", "b.example.com"


class World:
    """The records of a cluster with an authority that responds as ``respond`` says."""

    def __init__(self, *wanted: str, respond: Callable[["World", Step], Outcome] | None = None) -> None:
        self.account = AcmeAccount(email="", directory="https://one/dir", key="account key")
        self.stacks = dict.fromkeys(wanted, "")
        self.problem = ""
        self.records: dict[str, HostCertificate] = {}
        self.now_ns = NOW_NS
        self.random = Random(1)
        self.respond = respond or World.issue
        self.steps: list[tuple[int, Step]] = []

    def issue(self, step: Step) -> Outcome:
        match step:
            case RegisterAccount():
                return AccountRegistered("https://one/account")
            case OpenOrder(name):
                return OrderOpened(f"https://one/order/{len(self.steps)}", {f"token of {name}": "text"})
            case RemoveRecords(name):
                return RecordsRemoved(self.records[name].left)
            case AskWindow():
                return WindowKnown(None, ASK_S)
            case _:
                return CertificateIssued(
                    chain="chain", not_before_ns=self.now_ns, not_after_ns=self.now_ns + LIFE_NS
                )

    def run(self, duration_ns: int) -> None:
        """Make all steps of the next ``duration_ns``."""
        end_ns, count = self.now_ns + duration_ns, len(self.steps)
        while self.now_ns < end_ns:
            step = next_step(self.account, Wanted(self.stacks, self.problem), self.records, self.now_ns)
            if isinstance(step, WaitUntil):
                if step.at_ns is None or step.at_ns > end_ns:
                    self.now_ns = end_ns
                    return
                assert step.at_ns > self.now_ns
                self.now_ns = step.at_ns
                continue
            self.steps.append((self.now_ns, step))
            assert len(self.steps) - count < 10_000
            self.take(step)

    def take(self, step: Step) -> None:
        match step:
            case BeginOrder(name):
                present = present_record(self.account, self.records, name)
                self.records[name] = begun(present, self.account, "key", self.now_ns)
            case DropOrder(name, is_needed):
                kept = dropped(self.records[name], self.now_ns, is_needed=is_needed)
                self.records = {
                    **{k: v for k, v in self.records.items() if k != name},
                    **({name: kept} if kept else {}),
                }
            case _:
                outcome, chance = self.respond(self, step), self.random.random()
                self.now_ns += SECOND_NS
                if not isinstance(step, RemoveRecords | AskWindow):
                    self.account = after_account(self.account, outcome, self.now_ns, chance)
                if isinstance(step, OpenOrder | ContinueOrder | RemoveRecords | AskWindow):
                    record = self.records[step.name]
                    self.records[step.name] = after_step(record, outcome, self.now_ns, chance)

    def times(self, kind: type[Step], name: str = "") -> list[int]:  # type: ignore[valid-type]
        return [
            at
            for at, step in self.steps
            if isinstance(step, kind) and name in ("", getattr(step, "name", ""))
        ]


def away(world: World, step: Step) -> Outcome:
    return AcmeFailed(reason="connection refused", is_away=True)


def suggesting(at: Callable[[World], int | None], ask_s: float = ASK_S) -> Callable[[World, Step], Outcome]:
    def respond(world: World, step: Step) -> Outcome:
        return WindowKnown(at(world), ask_s) if isinstance(step, AskWindow) else world.issue(step)

    return respond


@pytest.mark.parametrize(
    ("suggested", "renewed_after"),
    [
        (lambda world: NOW_NS + 40 * DAY_NS, 40),
        (lambda world: NOW_NS + 200 * DAY_NS, 75),  # before the renewal would be overdue
        (lambda world: None, 57),
    ],
)
def test_the_authority_suggests_when_to_renew(
    suggested: Callable[[World], int | None], renewed_after: int
) -> None:
    world = World(A, respond=suggesting(suggested))
    world.run(88 * DAY_NS)
    _, renewal, *_ = world.times(BeginOrder)
    assert renewed_after <= (renewal - NOW_NS) / DAY_NS < renewed_after + 3
    asked = [at for at in world.times(AskWindow) if at < renewal]
    assert {round((after - before) / HOUR_NS) for before, after in pairwise(asked)} == {6}


def test_a_window_that_begins_at_once_renews_after_the_least_time_alone() -> None:
    """A certificate that is to be revoked is renewed early, and no response makes the leader order all the time."""
    world = World(A, respond=suggesting(lambda world: 0, ask_s=0.0))
    world.run(10 * DAY_NS)
    orders, asks = world.times(BeginOrder), world.times(AskWindow)
    assert all(after - before >= DAY_NS for before, after in pairwise(orders))
    assert len(orders) >= 9
    assert min(after - before for before, after in pairwise(asks)) >= HOUR_NS - 60 * SECOND_NS


def refusing(world: World, step: Step) -> Outcome:
    if isinstance(step, ContinueOrder):
        return AcmeFailed(reason="no such host", is_over=True)
    return world.issue(step)


def test_an_order_is_made_step_by_step_with_the_challenge_stored_before_it_is_used() -> None:
    world = World(A)
    world.run(HOUR_NS)
    kinds = [type(step) for _, step in world.steps]
    assert kinds == [RegisterAccount, BeginOrder, OpenOrder, ContinueOrder, AskWindow]
    [opened], [continued] = world.times(OpenOrder), world.times(ContinueOrder)
    assert continued - opened >= PUBLISH_S * SECOND_NS
    record = world.records[A]
    assert record.pem == "chain\nkey\n"
    assert record.order is None


def test_each_certificate_is_renewed_once_in_every_two_thirds_of_its_life() -> None:
    world = World(A, B)
    world.run(365 * DAY_NS)
    for name in (A, B):
        begun_at = world.times(BeginOrder, name)
        assert len(begun_at) in (7, 6)
        gaps = [later - earlier for earlier, later in pairwise(begun_at)]
        assert all(LIFE_NS * 0.63 - HOUR_NS < gap < LIFE_NS * 0.67 + HOUR_NS for gap in gaps)


def test_an_authority_that_is_away_for_a_week_is_tried_hourly_and_then_used_at_once() -> None:
    world = World(A, respond=away)
    world.run(7 * DAY_NS)
    assert world.account.failing_since_ns == NOW_NS + SECOND_NS
    assert world.account.error == "connection refused"
    assert 7 * 18 < len(world.steps) < 7 * 24 + 20
    world.respond = World.issue
    world.run(int(LONGEST_AWAY_S * 1.3) * SECOND_NS)
    assert world.records[A].pem
    assert (world.account.error, world.account.failing_since_ns) == ("", 0)


def test_an_order_outlives_an_authority_that_is_away() -> None:
    world = World(
        A, respond=lambda w, step: away(w, step) if isinstance(step, ContinueOrder) else w.issue(step)
    )
    world.run(DAY_NS)
    order = world.records[A].order
    assert order is not None
    world.respond = World.issue
    world.run(2 * HOUR_NS)
    assert world.records[A].pem
    assert len(world.times(BeginOrder)) == 1


def test_a_name_that_fails_is_tried_at_most_five_times_in_an_hour_and_keeps_nobody_waiting() -> None:
    world = World(A, respond=refusing)
    world.run(30 * DAY_NS)
    tried = world.times(ContinueOrder)
    assert all(later - earlier > HOUR_NS for earlier, later in zip(tried, tried[5:], strict=False))
    assert tried[-1] - tried[-2] > 11 * HOUR_NS
    assert world.records[A].error == "no such host"
    world.stacks[B] = ""
    world.respond = lambda w, step: refusing(w, step) if getattr(step, "name", A) == A else w.issue(step)
    world.run(60 * SECOND_NS)
    assert world.records[B].pem


@pytest.mark.parametrize("kind", [OpenOrder, ContinueOrder])
def test_a_limit_holds_back_one_name_for_as_long_as_the_authority_says(kind: type[Step]) -> None:  # type: ignore[valid-type]
    def limited(world: World, step: Step) -> Outcome:
        if isinstance(step, kind) and getattr(step, "name", "") == A:
            return AcmeFailed(reason="too many", retry_after_s=36 * 3600.0)
        return world.issue(step)

    world = World(A, B, respond=limited)
    world.run(DAY_NS)
    assert len(world.times(kind, A)) == 1
    assert world.records[B].pem
    world.respond = World.issue
    world.run(DAY_NS)
    assert world.records[A].pem
    assert len(world.times(BeginOrder, A)) == 1


def test_an_order_that_never_ends_is_given_up() -> None:
    world = World(
        A, respond=lambda w, step: OrderPending() if isinstance(step, ContinueOrder) else w.issue(step)
    )
    world.run(30 * SECOND_NS)
    order = world.records[A].order
    assert order is not None
    later = after_step(world.records[A], OrderPending(), order.began_ns + 2 * HOUR_NS, 0.5)
    assert later.order is None
    assert "did not finish" in later.error


def test_an_authority_that_forgets_the_account_is_not_asked_in_a_tight_loop() -> None:
    def forgetting(world: World, step: Step) -> Outcome:
        return (
            AcmeFailed(reason="unknown", is_unknown=True)
            if isinstance(step, OpenOrder)
            else world.issue(step)
        )

    world = World(A, respond=forgetting)
    world.run(DAY_NS)
    assert 10 < len(world.times(RegisterAccount)) < 50


def test_a_refused_registration_is_shown_and_tried_again_later() -> None:
    world = World(A, respond=lambda w, step: AcmeFailed(reason="agree to the terms", is_over=True))
    world.run(DAY_NS)
    assert world.account.error == "agree to the terms"
    assert len(world.steps) < 40


def test_a_name_without_a_service_loses_its_order_at_once_and_its_certificate_when_it_expires() -> None:
    world = World(A)
    world.run(HOUR_NS)
    world.stacks.clear()
    world.run(80 * DAY_NS)
    assert world.records[A].pem
    world.stacks[A] = ""
    assert len(world.times(BeginOrder)) == 1
    world.stacks.clear()
    world.run(20 * DAY_NS)
    assert world.records  # nothing wakes the loop for it, until the next step
    assert next_step(world.account, Wanted({}), world.records, world.now_ns) == DropOrder(A)
    opened = replace(HostCertificate(name=B), order=CertificateOrder(key="key", began_ns=0))
    assert next_step(world.account, Wanted({}), {B: opened}, world.now_ns) == DropOrder(B)


def test_another_authority_issues_everything_again_and_forgets_what_failed() -> None:
    world = World(
        A, B, respond=lambda w, step: refusing(w, step) if getattr(step, "name", "") == B else w.issue(step)
    )
    world.run(2 * DAY_NS)
    world.account = replace(world.account, directory="https://two/dir", url="")
    world.respond = World.issue
    world.run(60 * SECOND_NS)
    assert {record.authority for record in world.records.values()} == {"https://two/dir"}


@pytest.mark.parametrize("ahead_ns", [400 * DAY_NS, -400 * DAY_NS])
def test_a_wrong_clock_orders_a_name_at_most_daily_and_does_not_stop_renewals(ahead_ns: int) -> None:
    def honest(world: World, step: Step) -> Outcome:
        outcome = world.issue(step)
        if not isinstance(outcome, CertificateIssued):
            return outcome
        true_ns = world.now_ns - offset_ns
        return replace(outcome, not_before_ns=true_ns, not_after_ns=true_ns + LIFE_NS)

    offset_ns = ahead_ns
    world = World(A, respond=honest)
    world.now_ns += offset_ns
    world.run(10 * DAY_NS)
    assert len(world.times(BeginOrder)) <= 11
    world.now_ns, offset_ns = world.now_ns - ahead_ns, 0
    world.run(70 * DAY_NS)
    assert world.records[A].not_after_ns > world.now_ns


def test_a_retry_that_was_planned_before_the_clock_was_set_back_is_due_at_once() -> None:
    for respond in (away, refusing):
        world = World(A, respond=respond)
        world.now_ns += 400 * DAY_NS
        world.run(HOUR_NS)
        world.now_ns -= 400 * DAY_NS
        world.respond = World.issue
        world.run(60 * SECOND_NS)
        assert world.records[A].pem


def valid(name: str) -> HostCertificate:
    return HostCertificate(name=name, pem="pem", not_after_ns=NOW_NS + DAY_NS)


def test_more_names_than_the_limit_leave_the_ones_with_certificates_alone() -> None:
    known = {name: valid(name) for name in (f"k{number:04}.example.com" for number in range(NAMES_MAX))}
    assert considered_names(dict.fromkeys([*known, A], ""), known) == sorted(known)
    assert considered_names({A: "", B: ""}, {B: HostCertificate(name=B)}) == [B, A]


@pytest.mark.parametrize("has_certificates", [False, True])
def test_one_stack_cannot_use_up_the_names(has_certificates: bool) -> None:
    """Its newest name loses the place, and at once if its orders fail."""
    many = [f"n{number:04}.other.example" for number in range(NAMES_MAX)]
    last, world = "www.shop.example", World()
    world.account = replace(world.account, url="https://one/account")
    world.stacks = {**dict.fromkeys(many, "other"), last: "shop"}
    later_ns = NOW_NS + DAY_NS
    for name in many:
        found = valid(name) if has_certificates else HostCertificate(name=name, failures=3, error="x")
        world.records[name] = replace(
            found, tried="https://one/dir", authority="https://one/dir", retry_at_ns=later_ns
        )
    world.run(HOUR_NS)
    assert world.records[last].pem
    assert (many[-1] in world.records) == has_certificates
    assert many[-1] not in considered_names(world.stacks, world.records)
    assert len(world.records) <= NAMES_MAX + 1


def test_places_of_names_without_a_service_are_taken_first() -> None:
    unused = {name: valid(name) for name in (f"u{number:04}.example.com" for number in range(RECORDS_MAX))}
    unused["u0007.example.com"] = replace(unused["u0007.example.com"], not_after_ns=NOW_NS + 1)
    world = World(A)
    step = next_step(world.account, Wanted({A: ""}), unused, NOW_NS)
    assert step == DropOrder("u0007.example.com", is_needed=True)
    known = replace(world.account, url="https://one/account")
    stacks = {**dict.fromkeys(unused, "other"), A: "shop"}
    used = {
        name: replace(one, authority=known.directory, tried=known.directory, renew_at_ns=NOW_NS + 1)
        for name, one in unused.items()
    }
    used = {name: replace(one, ask_at_ns=NOW_NS + HOUR_NS) for name, one in used.items()}
    assert next_step(known, Wanted(stacks), used, NOW_NS) == WaitUntil(
        NOW_NS + 1
    )  # until one of them expires
    assert next_step(known, Wanted(stacks), dict(list(used.items())[1:]), NOW_NS) == BeginOrder(A)


def test_nothing_is_ordered_without_a_door_and_its_start_orders_at_once() -> None:
    world = World(A)
    world.problem = "no door"
    world.run(10 * DAY_NS)
    assert [type(step) for _, step in world.steps] == [RegisterAccount]
    world.problem = ""
    world.run(60 * SECOND_NS)
    assert world.records[A].pem
    world.problem = "no door"
    world.run(80 * DAY_NS)
    assert len(world.times(BeginOrder)) == 1


@pytest.mark.parametrize(
    "outcome",
    [
        OrderPending(look_after_s=60.0),
        AcmeFailed(reason="over", is_over=True),
        AcmeFailed(reason="forgotten", is_unknown=True),
        None,
    ],
)
def test_records_of_every_order_that_ended_are_removed(outcome: Outcome | None) -> None:
    def respond(world: World, step: Step) -> Outcome:
        if isinstance(step, OpenOrder):
            return OrderOpened("u", dns={f"_acme-challenge.{A}": f"value {len(world.steps)}"})
        is_open = isinstance(step, ContinueOrder) and not world.times(RemoveRecords)
        return outcome if outcome is not None and is_open else world.issue(step)

    world = World(A, respond=respond)
    world.run(2 * HOUR_NS)
    assert len(world.times(RemoveRecords)) == len(world.times(BeginOrder)) > 0
    assert world.records[A].left == {}


def test_records_of_a_dropped_order_are_removed_before_the_record_ends() -> None:
    world = World()
    records = {"_acme-challenge.a": "value"}
    world.records[A] = HostCertificate(
        name=A, order=CertificateOrder(key="k", began_ns=1, url="u", dns=records)
    )
    world.run(HOUR_NS)
    assert [step for _, step in world.steps[:3]] == [DropOrder(A), RemoveRecords(A), DropOrder(A)]
    assert world.records == {}
    moved = HostCertificate(
        name=A, tried="https://other/dir", order=CertificateOrder(key="k", began_ns=1, dns=records)
    )
    assert present_record(world.account, {A: moved}, A).left == records


OUTCOMES = st.sampled_from(
    [
        AcmeFailed(reason="away", is_away=True),
        AcmeFailed(reason="over", is_over=True),
        AcmeFailed(reason="kept"),
        AcmeFailed(reason="limited", retry_after_s=7200.0),
        AcmeFailed(reason="forgotten", is_unknown=True),
        OrderPending(),
        None,
    ]
)


@settings(max_examples=60, deadline=None)
@given(script=st.lists(OUTCOMES, max_size=40), deaths=st.lists(st.booleans(), max_size=40))
def test_whatever_happened_every_name_has_a_certificate_a_day_later(
    script: list[Outcome | None], deaths: list[bool]
) -> None:
    """A death is a step that the authority has made, and whose result is not stored."""
    outcomes, dying = iter(script), iter(deaths)

    def respond(world: World, step: Step) -> Outcome:
        outcome = next(outcomes, None)
        return outcome if outcome is not None and not isinstance(step, RegisterAccount) else world.issue(step)

    class Mortal(World):
        def take(self, step: Step) -> None:
            before = self.account, dict(self.records)
            super().take(step)
            if next(dying, False):
                self.account, self.records = before

    world = Mortal(A, B, respond=respond)
    world.run(4 * DAY_NS)
    for name in (A, B):
        assert world.records[name].pem, (world.account, world.records[name])
        assert world.records[name].order is None
