"""Certificates as the API, warnings, notifications and metrics show them, without keys.  Pure."""

from collections.abc import Iterator

from msgspec.structs import replace

from skep.api.telemetry.exposition import MetricFamily, Sample, label_text
from skep.manager.acme.own_certificates import OwnCertificate, own_certificates
from skep.manager.acme.records import (
    AcmeAccount,
    CertificateOrder,
    HostCertificate,
    account_in,
    locked_names,
    records_in,
)
from skep.manager.acme.state import WantedNames, names_of_routes
from skep.manager.acme.steps import (
    LEFT_SHARE,
    Wanted,
    considered_names,
    due_at_ns,
    present_record,
    share_problem,
)
from skep.model.options.certificates import (
    AuthorityShown,
    CertificateProgress,
    CertificateShown,
    CertificatesShown,
)
from skep.model.values.times import SECOND_NS, Timestamp, minute, timestamp
from skep.store.interface import View

_OVERDUE_SHARE = 2 * LEFT_SHARE
"""A certificate expires soon if less than a sixth of its life is left: half of the time for renewals has passed."""


def shown_certificates(view: View, now_ns: int, wanted: WantedNames = names_of_routes) -> CertificatesShown:
    """Return the authority and all names, sorted."""
    account, records, names = account_in(view), records_in(view), wanted(view)
    considered = frozenset(considered_names(names.stacks, records))
    own, locked = own_certificates(view), locked_names(view)
    return CertificatesShown(
        authority=_shown_authority(account) if account is not None else None,
        certificates=tuple(
            _shown_own(name, own[name], now_ns)
            if name in own
            else CertificateShown(
                name=name,
                state=CertificateProgress.FAILING,
                is_wanted=name in names.stacks,
                error="the store cannot read its record: see docker info",
            )
            if name in locked
            else _with_reason(
                _shown(account, records, name, name in names.stacks, now_ns), names, name in considered
            )
            for name in sorted({*records, *names.stacks, *own})
        ),
    )


def _shown_own(name: str, own: OwnCertificate, now_ns: int) -> CertificateShown:
    expired = "it has expired" if own.pem and own.not_after_ns <= now_ns else ""
    problem = own.problem or expired
    return CertificateShown(
        name=name,
        state=CertificateProgress.FAILING if problem else CertificateProgress.VALID,
        secret=own.secret,
        not_before=_time(own.not_before_ns),
        not_after=_time(own.not_after_ns),
        error=problem,
    )


def _shown_authority(account: AcmeAccount) -> AuthorityShown:
    return AuthorityShown(
        email=account.email,
        directory=account.directory,
        is_registered=bool(account.url),
        error=account.error,
        failing_since=_time(account.failing_since_ns),
        next_attempt_at=_time(account.retry_at_ns),
    )


def _shown(
    account: AcmeAccount | None, records: dict[str, HostCertificate], name: str, is_wanted: bool, now_ns: int
) -> CertificateShown:
    record = records.get(name) or HostCertificate(name=name)
    next_ns = 0
    if account is not None:
        record = present_record(account, records, name)
        if is_wanted and record.order is None:
            next_ns = max(due_at_ns(account, record, now_ns), account.retry_at_ns)
    return CertificateShown(
        name=name,
        state=_progress(record, now_ns),
        is_wanted=is_wanted,
        not_before=_time(record.not_before_ns),
        not_after=_time(record.not_after_ns),
        order=_order_step(record.order),
        next_attempt_at=_time(next_ns if next_ns > now_ns else 0),
        error=record.error,
        failing_since=_time(record.failing_since_ns),
    )


def _with_reason(shown: CertificateShown, names: Wanted, is_considered: bool) -> CertificateShown:
    """Return a name with the reason why nothing is ordered for it, unless an order has failed."""
    if not shown.is_wanted or shown.error:
        return shown
    if not is_considered:
        return replace(shown, error=share_problem(names.stacks[shown.name]), next_attempt_at=Timestamp(""))
    if names.problem and shown.state is CertificateProgress.WANTED:
        return replace(shown, error=names.problem, next_attempt_at=Timestamp(""))
    return shown


def _order_step(order: CertificateOrder | None) -> str:
    if order is None:
        return ""
    if not order.url:
        return "not sent yet"
    if order.dns:
        return "waiting for the challenge in DNS"
    return "waiting for the challenge" if order.challenges else "waiting for the certificate"


def _progress(record: HostCertificate, now_ns: int) -> CertificateProgress:
    if record.error:
        return CertificateProgress.FAILING
    if record.order is not None:
        return CertificateProgress.ORDERING
    return CertificateProgress.VALID if record.not_after_ns > now_ns else CertificateProgress.WANTED


def expiring_soon(
    view: View, now_ns: int, wanted: WantedNames = names_of_routes
) -> Iterator[tuple[str, str]]:
    """Yield the names whose certificates are not renewed in time, each with a sentence.

    An attempt that failed is reported from the time at which renewals begin.
    """
    for name, one in own_certificates(view).items():
        if one.problem:
            yield name, f"{name} has no certificate: {one.problem}"
        elif _is_left(_OVERDUE_SHARE, one.not_before_ns, one.not_after_ns, now_ns):
            words = _expiry(name, one.not_after_ns, now_ns)
            yield name, f"{words}. Run skep secret rotate {one.secret} FILE"
    if (account := account_in(view)) is None:
        return
    names, records = wanted(view), records_in(view)
    considered = frozenset(considered_names(names.stacks, records))
    for name, record in records.items():
        reason = record.error or account.error
        share = LEFT_SHARE if reason else _OVERDUE_SHARE
        if (
            record.pem
            and name in names.stacks
            and _is_left(share, record.not_before_ns, record.not_after_ns, now_ns)
        ):
            words = _expiry(name, record.not_after_ns, now_ns)
            reason = reason or (names.problem if name in considered else share_problem(names.stacks[name]))
            yield name, f"{words} and is not renewed{f': {reason}' if reason else ''}"


def _is_left(share: int, not_before_ns: int, not_after_ns: int, now_ns: int) -> bool:
    """Return whether less than one ``share`` of a certificate's life is left."""
    return (not_after_ns - now_ns) * share <= not_after_ns - not_before_ns


def _expiry(name: str, not_after_ns: int, now_ns: int) -> str:
    verb = "expired" if not_after_ns <= now_ns else "expires"
    day = minute(timestamp(not_after_ns))
    return f"the certificate of {name} {verb} on {day}"


def certificate_warnings(view: View, now_ns: int) -> Iterator[str]:
    """Yield a warning if certificates expire soon.  It names no hosts, because every user reads it."""
    if number := len(list(expiring_soon(view, now_ns))):
        words = "certificate is" if number == 1 else "certificates are"
        yield f"WARNING: {number} {words} missing or not renewed in time (skep certificate ls)"


def certificate_families(view: View) -> list[MetricFamily]:
    """Return the metrics of certificates."""
    records = [one for one in records_in(view).values() if one.pem or one.error]
    own = {name: one for name, one in own_certificates(view).items() if one.pem}
    expiries = {one.name: one.not_after_ns for one in records if one.pem}
    expiries |= {name: one.not_after_ns for name, one in own.items()}
    starts = {one.name: one.not_before_ns for one in records if one.pem}
    starts |= {name: one.not_before_ns for name, one in own.items()}
    return [
        MetricFamily(
            "skep_certificate_expires_timestamp_seconds",
            "gauge",
            "Time at which the certificate of a host name expires.",
            [_sample(name, at_ns / SECOND_NS) for name, at_ns in sorted(expiries.items())],
        ),
        MetricFamily(
            "skep_certificate_valid_from_timestamp_seconds",
            "gauge",
            "Time from which the certificate of a host name is valid.",
            [_sample(name, at_ns / SECOND_NS) for name, at_ns in sorted(starts.items())],
        ),
        MetricFamily(
            "skep_certificate_failures",
            "gauge",
            "Failed orders of a host name since its last certificate.",
            [_sample(one.name, one.failures) for one in records],
        ),
    ]


def _sample(name: str, value: float) -> Sample:
    return Sample(label_text({"name": name}), value)


def _time(at_ns: int) -> Timestamp:
    return timestamp(at_ns) if at_ns else Timestamp("")
