"""Decides the next step for certificates, and the effect of each outcome.  Pure.

An order has several steps, and the leader may change between any two of them.  So each step is decided from the records
alone.  What a later step needs is stored before the step that cannot be repeated: the account's key before the
registration, the certificate's key before the order, and the challenges before the authority validates them.  A
repeated step reads the order's state from the authority and continues there.
"""

from collections.abc import Collection, Mapping
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from skep.manager.acme.records import (
    NAMES_MAX,
    RECORDS_MAX,
    AcmeAccount,
    CertificateOrder,
    HostCertificate,
)
from skep.model.values.times import SECOND_NS

FIRST_RETRY_S, LONGEST_RETRY_S = 180.0, 12 * 3600.0
"""Seconds before the second attempt for a name, and the longest between two.  Attempts after 0, 3, 9, 21 and 45 minutes
are what Let's Encrypt allows in an hour (five failed validations of a name).
"""
FIRST_AWAY_S, LONGEST_AWAY_S = 30.0, 3600.0
"""The same for an authority that does not respond.  An outage is over within minutes or lasts for hours."""
RETRY_AFTER_S_MAX = 7 * 24 * 3600.0
"""Longest ``Retry-After`` in seconds.  It is Let's Encrypt's longest period of a limit."""
LIMITED_S = 3600.0
"""Seconds that a limit of the authority lasts if its response does not say so."""
ASK_S, ASK_S_MIN = 6 * 3600.0, 3600.0
"""Seconds until an authority is asked again when to renew, if its response does not say so, and the least time.
Source: RFC 9773, 4.3.3."""
ORDER_S = 3600.0
"""Seconds after which an order that does not end is given up.  Authorities need minutes for a slow one."""
LOOK_S, LOOK_S_MAX = 2.0, 60.0
"""Seconds between two looks at an order, and the longest ``Retry-After`` that is respected there.  Other names wait."""
PUBLISH_S = 3.0
"""Seconds from the storing of a challenge until the authority is told.  The doors get it within one."""
LEFT_SHARE = 3
"""A certificate is renewed when one third of its life is left, as Let's Encrypt recommends."""
SPREAD_SHARE = 30
"""Renewals are earlier by up to this share of the life, so that names of one deploy do not stay together."""
ISSUED_S_MIN = 24 * 3600.0
"""Shortest time in seconds between two orders for a name.  A wrong clock must not use up a week's limit at once."""
_CLOCK_SET_NS = int((RETRY_AFTER_S_MAX + 24 * 3600.0) * SECOND_NS)
"""A time further in the future was recorded before the clock was set back."""


class Wanted(msgspec.Struct, frozen=True):
    """The names of services.

    Attributes:
        stacks: The stack of each name, or an empty text outside of stacks.
        problem: Why nothing can be ordered now, or empty.
    """

    stacks: Mapping[str, str]
    problem: str = ""


class RegisterAccount(msgspec.Struct, frozen=True):
    """Tell the authority about the account."""


class BeginOrder(msgspec.Struct, frozen=True):
    """Store a key for a new order of this name."""

    name: str


class OpenOrder(msgspec.Struct, frozen=True):
    """Send the stored order of this name."""

    name: str


class ContinueOrder(msgspec.Struct, frozen=True):
    """Read the state of the order of this name, and make its next step."""

    name: str


class DropOrder(msgspec.Struct, frozen=True):
    """Remove the order of a name that no service has any longer, and its record if that is useless.

    With ``is_needed``, another name needs the place of its record.
    """

    name: str
    is_needed: bool = False


class RemoveRecords(msgspec.Struct, frozen=True):
    """Remove the TXT records that former orders of this name have left."""

    name: str


class AskWindow(msgspec.Struct, frozen=True):
    """Ask the authority when to renew the certificate of this name (ARI, RFC 9773)."""

    name: str


class WaitUntil(msgspec.Struct, frozen=True):
    """Do nothing until a Unix time, or until the store changes if that is None."""

    at_ns: int | None = None


Step: TypeAlias = (
    RegisterAccount
    | BeginOrder
    | OpenOrder
    | ContinueOrder
    | DropOrder
    | RemoveRecords
    | AskWindow
    | WaitUntil
)


class AccountRegistered(msgspec.Struct, frozen=True):
    """The authority knows the account."""

    url: str


class OrderOpened(msgspec.Struct, frozen=True):
    """The authority has accepted the order.

    Attributes:
        challenges: Key authorizations by token (HTTP-01).
        dns: Values of TXT records by name (DNS-01).
    """

    url: str
    challenges: dict[str, str] = {}
    dns: dict[str, str] = {}


class RecordsRemoved(msgspec.Struct, frozen=True):
    """The administrator's program has run for these TXT records."""

    records: dict[str, str]


class OrderPending(msgspec.Struct, frozen=True):
    """The order needs another look."""

    look_after_s: float = LOOK_S


class CertificateIssued(msgspec.Struct, frozen=True, kw_only=True):
    """The certificate and its chain (PEM)."""

    chain: str
    not_before_ns: int
    not_after_ns: int


class WindowKnown(msgspec.Struct, frozen=True):
    """The authority suggests a time for the renewal.

    Attributes:
        renew_at_ns: None if it suggests none, or did not respond.
        ask_after_s: Seconds until it is asked again.
    """

    renew_at_ns: int | None
    ask_after_s: float


class AcmeFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A step failed.

    Attributes:
        retry_after_s: Seconds until the authority accepts another attempt, or 0.
        is_away: Whether the failure is one of the authority as a whole.
        is_over: Whether the order is useless now.
        is_unknown: Whether the authority does not know the account.
    """

    reason: str
    retry_after_s: float = 0.0
    is_away: bool = False
    is_over: bool = False
    is_unknown: bool = False


Outcome: TypeAlias = (
    AccountRegistered
    | OrderOpened
    | OrderPending
    | CertificateIssued
    | RecordsRemoved
    | WindowKnown
    | AcmeFailed
)


def next_step(
    account: AcmeAccount,
    wanted: Wanted,
    records: Mapping[str, HostCertificate],
    now_ns: int,
    look_at: Mapping[str, int] = {},
    publish_s: float = PUBLISH_S,
) -> Step:
    """Return the next step, one order at a time.

    Args:
        look_at: Times of the next look at orders, by name.  A new leader looks at once.
        publish_s: Seconds until the doors have a stored challenge.
    """
    names = considered_names(wanted.stacks, records)
    if (useless := _useless(names, wanted.stacks, records, now_ns)) is not None:
        return useless
    if (at_ns := _bounded(account.retry_at_ns, now_ns)) > now_ns:
        return WaitUntil(at_ns)
    if not account.url:
        return RegisterAccount()
    has_place = len(records) < RECORDS_MAX
    considered = [present_record(account, records, name) for name in names if has_place or name in records]
    for record in considered:
        order = record.order
        if order is None or _bounded(record.retry_at_ns, now_ns) > now_ns:
            continue  # an order that has to wait for its authority does not keep others waiting
        if not order.url:
            if wanted.problem:
                continue
            return OpenOrder(record.name)
        published_ns = _bounded(order.opened_ns + _ns(publish_s), now_ns)
        at_ns = max(published_ns, _bounded(look_at.get(record.name, 0), now_ns))
        return ContinueOrder(record.name) if at_ns <= now_ns else WaitUntil(at_ns)
    if wanted.problem:
        return WaitUntil()
    # Names without a certificate come first, then names in the order of their expiry.
    due = [(due_at_ns(account, record, now_ns), record.not_after_ns, record.name) for record in considered]
    if ready := [(not_after_ns, name) for at_ns, not_after_ns, name in due if at_ns <= now_ns]:
        return BeginOrder(min(ready)[1])
    asks = [
        (_bounded(record.ask_at_ns, now_ns), record.name)
        for record in considered
        if record.order is None and record.authority == account.directory and record.not_after_ns > now_ns
    ]
    if asks and min(asks)[0] <= now_ns:
        return AskWindow(min(asks)[1])
    times = [at_ns for at_ns, _, _ in due] + [at_ns for at_ns, _ in asks]
    return WaitUntil(min(times) if times else None)


def _useless(
    names: Collection[str], stacks: Collection[str], records: Mapping[str, HostCertificate], now_ns: int
) -> Step | None:
    """Return the step that removes something useless, or None.

    Certificates stay until they expire, unless no service has the name and another name needs the place.
    """
    kept = frozenset(names)
    is_full = len(records) >= RECORDS_MAX and not kept <= records.keys()
    for name, record in records.items():
        if record.left:
            return RemoveRecords(name)
        if name not in kept and (record.order is not None or record.not_after_ns <= now_ns):
            return DropOrder(name)
    unused = sorted((one.not_after_ns, name) for name, one in records.items() if name not in stacks)
    return DropOrder(unused[0][1], is_needed=True) if is_full and unused else None


def considered_names(stacks: Mapping[str, str], records: Mapping[str, HostCertificate]) -> list[str]:
    """Return the names for which certificates are ordered: at most ``NAMES_MAX``, in equal shares of the stacks.

    Each stack's names with a certificate come first, then names that were tried.  New names need a place for a record.
    """
    ranks: dict[str, int] = {}
    ranked: list[tuple[int, str]] = []
    for name in sorted(stacks, key=lambda one: (not _has_certificate(one, records), one not in records, one)):
        rank = ranks[stacks[name]] = ranks.get(stacks[name], 0) + 1
        ranked.append((rank, name))
    return [name for _, name in sorted(ranked)[:NAMES_MAX]]


def _has_certificate(name: str, records: Mapping[str, HostCertificate]) -> bool:
    return name in records and bool(records[name].pem)


def share_problem(stack: str) -> str:
    """Return why no certificate is ordered for a name that is not considered."""
    where = f"stack {stack} has" if stack else "services without a stack have"
    return f"{where} more names than its share of the {NAMES_MAX} for which certificates are ordered: remove some"


def present_record(
    account: AcmeAccount, records: Mapping[str, HostCertificate], name: str
) -> HostCertificate:
    """Return the record of a name, without an order and failures at another authority."""
    record = records.get(name) or HostCertificate(name=name)
    if record.tried == account.directory:
        return record
    return replace(
        without_order(record),
        failures=0,
        error="",
        failing_since_ns=0,
        retry_at_ns=0,
        blocked_until_ns=0,
    )


def without_order(record: HostCertificate) -> HostCertificate:
    """Return the record after its order, whose TXT records are still to be removed."""
    left = record.order.dns if record.order is not None else {}
    return replace(record, order=None, left={**record.left, **left})


def due_at_ns(account: AcmeAccount, record: HostCertificate, now_ns: int) -> int:
    """Return the Unix time from which a certificate for the name is ordered, or its order is continued."""
    blocked_ns = _bounded(record.blocked_until_ns, now_ns)
    if record.is_asked:
        return blocked_ns
    earliest_ns = max(blocked_ns, _bounded(record.retry_at_ns, now_ns))
    if record.order is not None or not record.pem or record.authority != account.directory:
        return earliest_ns
    return max(earliest_ns, record.renew_at_ns)


def begun(record: HostCertificate, account: AcmeAccount, key: str, now_ns: int) -> HostCertificate:
    """Return the record with a new order, which is not sent yet."""
    order = CertificateOrder(key=key, began_ns=now_ns)
    return replace(record, order=order, tried=account.directory, is_asked=False)


def asked(record: HostCertificate) -> HostCertificate:
    """Return the record after a user has asked for a renewal.  Only the authority's own limits still hold."""
    return replace(record, is_asked=record.order is None, retry_at_ns=record.blocked_until_ns)


def dropped(record: HostCertificate, now_ns: int, *, is_needed: bool = False) -> HostCertificate | None:
    """Return the record of a name that no service has any longer, or None if it is useless.

    Its certificate stays until it expires, because a service may come back within minutes, unless its place
    ``is_needed``.
    """
    ended = replace(without_order(record), is_asked=False)
    is_useful = record.not_after_ns > now_ns and not is_needed
    return ended if is_useful or ended.left else None


def after_account(account: AcmeAccount, outcome: Outcome, now_ns: int, chance: float) -> AcmeAccount:
    """Return the account after a step.

    Args:
        chance: A random number from 0 to 1.
    """
    match outcome:
        case AcmeFailed(is_away=away, is_unknown=unknown) if away or unknown or not account.url:
            delay_s = _delay_s(FIRST_AWAY_S, LONGEST_AWAY_S, account.failures, chance)
            return replace(
                account,
                url="" if unknown else account.url,
                failures=account.failures + 1,
                error=outcome.reason,
                failing_since_ns=account.failing_since_ns or now_ns,
                retry_at_ns=now_ns + _ns(max(delay_s, _retry_after_s(outcome, chance))),
            )
        case AccountRegistered(url=url):
            # The failures still count, in case the authority forgets the account again.
            return replace(account, url=url, error="", failing_since_ns=0, retry_at_ns=0)
        case _:
            return replace(account, failures=0, error="", failing_since_ns=0, retry_at_ns=0)


def after_step(record: HostCertificate, outcome: Outcome, now_ns: int, chance: float) -> HostCertificate:
    """Return the record of a name after a step of its order.

    Args:
        chance: A random number from 0 to 1.
    """
    if isinstance(outcome, RecordsRemoved):
        left = {name: value for name, value in record.left.items() if outcome.records.get(name) != value}
        return replace(record, left=left)
    if isinstance(outcome, WindowKnown):
        return _with_window(record, outcome, now_ns)
    order = record.order
    if order is None:  # it was asked when to renew
        failed = isinstance(outcome, AcmeFailed) and bool(record.pem)
        return _with_window(record, WindowKnown(None, ASK_S), now_ns) if failed else record
    match outcome:
        case OrderOpened(url=url, challenges=challenges, dns=dns):
            opened_ns = now_ns if challenges else 0
            opened = replace(order, url=url, challenges=challenges, dns=dns, opened_ns=opened_ns)
            return replace(record, order=opened)
        case OrderPending() if now_ns - order.began_ns > _ns(ORDER_S):
            given_up = AcmeFailed(
                reason=f"the authority did not finish the order in {ORDER_S / 60:g} minutes"
            )
            return _failed(without_order(record), given_up, now_ns, chance)
        case CertificateIssued():
            return _issued(record, order, outcome, now_ns, chance)
        case AcmeFailed(is_unknown=True):
            return without_order(record)  # an order belongs to its account
        case AcmeFailed(is_away=False):
            return _failed(without_order(record) if outcome.is_over else record, outcome, now_ns, chance)
        case _:
            return record


def _with_window(record: HostCertificate, window: WindowKnown, now_ns: int) -> HostCertificate:
    """Return the record with the authority's time for the renewal, before its renewal would be overdue."""
    latest_ns = record.not_after_ns - (record.not_after_ns - record.not_before_ns) // (2 * LEFT_SHARE)
    ask_s = min(max(window.ask_after_s, ASK_S_MIN), RETRY_AFTER_S_MAX)
    return replace(
        record,
        renew_at_ns=record.renew_at_ns
        if window.renew_at_ns is None
        else min(max(window.renew_at_ns, 0), latest_ns),
        ask_at_ns=now_ns + _ns(ask_s),
    )


def _issued(
    record: HostCertificate,
    order: CertificateOrder,
    issued: CertificateIssued,
    now_ns: int,
    chance: float,
) -> HostCertificate:
    life_ns = issued.not_after_ns - issued.not_before_ns
    early_ns = life_ns // LEFT_SHARE + int(life_ns / SPREAD_SHARE * chance)
    return HostCertificate(
        name=record.name,
        pem=f"{issued.chain.strip()}\n{order.key.strip()}\n",
        authority=record.tried,
        tried=record.tried,
        not_before_ns=issued.not_before_ns,
        not_after_ns=issued.not_after_ns,
        renew_at_ns=issued.not_after_ns - early_ns,
        retry_at_ns=now_ns + min(life_ns // LEFT_SHARE, _ns(ISSUED_S_MIN)),
        left=without_order(record).left,
    )


def _failed(record: HostCertificate, failed: AcmeFailed, now_ns: int, chance: float) -> HostCertificate:
    delay_s = _delay_s(FIRST_RETRY_S, LONGEST_RETRY_S, record.failures, chance)
    blocked_s = _retry_after_s(failed, chance)
    return replace(
        record,
        failures=record.failures + 1,
        error=failed.reason,
        failing_since_ns=record.failing_since_ns or now_ns,
        retry_at_ns=now_ns + _ns(max(delay_s, blocked_s)),
        blocked_until_ns=now_ns + _ns(blocked_s) if blocked_s else 0,
        is_asked=False,
    )


def _delay_s(first_s: float, longest_s: float, failures: int, chance: float) -> float:
    """Return the delay before the next attempt.  It is at least the planned one, because limits count attempts."""
    return min(first_s * 2.0 ** min(failures, 20), longest_s) * (1.0 + chance / 4)


def _retry_after_s(failed: AcmeFailed, chance: float) -> float:
    """Return the seconds of ``Retry-After``, and a little more, so that clusters do not return all at once."""
    return min(failed.retry_after_s, RETRY_AFTER_S_MAX) * (1.0 + chance / 20)


def _bounded(at_ns: int, now_ns: int) -> int:
    """Return a recorded time, or now if it was recorded before the clock was set back."""
    return at_ns if at_ns - now_ns < _CLOCK_SET_NS else now_ns


def _ns(seconds: float) -> int:
    return int(seconds * SECOND_NS)
