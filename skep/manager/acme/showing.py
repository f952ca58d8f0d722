"""Certificates as the API, warnings, notifications and metrics show them, without keys.  Pure."""

from collections.abc import Iterator

from skep.api.telemetry.exposition import MetricFamily, Sample, label_text
from skep.manager.acme.records import AcmeAccount, HostCertificate, account_in, records_in
from skep.manager.acme.state import WantedNames, names_of_routes
from skep.manager.acme.steps import LEFT_SHARE, due_at_ns, present_record
from skep.model.options.certificates import (
    AuthorityShown,
    CertificateProgress,
    CertificateShown,
    CertificatesShown,
)
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.store.interface import View

_OVERDUE_SHARE = 2 * LEFT_SHARE
"""A certificate expires soon if less than a sixth of its life is left: half of the time for renewals has passed."""


def shown_certificates(view: View, now_ns: int, wanted: WantedNames = names_of_routes) -> CertificatesShown:
    """Return the authority and all names, sorted."""
    account, records, names = account_in(view), records_in(view), wanted(view)
    return CertificatesShown(
        authority=_shown_authority(account) if account is not None else None,
        certificates=tuple(
            _shown(account, records, name, name in names, now_ns) for name in sorted({*records, *names})
        ),
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
        next_attempt_at=_time(next_ns if next_ns > now_ns else 0),
        error=record.error,
        failing_since=_time(record.failing_since_ns),
    )


def _progress(record: HostCertificate, now_ns: int) -> CertificateProgress:
    if record.error:
        return CertificateProgress.FAILING
    if record.order is not None:
        return CertificateProgress.ORDERING
    return CertificateProgress.VALID if record.not_after_ns > now_ns else CertificateProgress.WANTED


def expiring_soon(
    view: View, now_ns: int, wanted: WantedNames = names_of_routes
) -> Iterator[tuple[str, str]]:
    """Yield the names whose certificates are not renewed in time, each with a sentence."""
    account = account_in(view)
    if account is None:
        return
    names = wanted(view)
    for name, record in records_in(view).items():
        left_ns = record.not_after_ns - now_ns
        life_ns = record.not_after_ns - record.not_before_ns
        if not record.pem or name not in names or left_ns * _OVERDUE_SHARE > life_ns:
            continue
        verb = "expired" if left_ns <= 0 else "expires"
        day = timestamp(record.not_after_ns)[:16].replace("T", " ")
        reason = record.error or account.error
        yield (
            name,
            f"the certificate of {name} {verb} on {day} UTC and is not renewed{f': {reason}' if reason else ''}",
        )


def certificate_warnings(view: View, now_ns: int) -> Iterator[str]:
    """Yield a warning if certificates expire soon.  It names no hosts, because every user reads it."""
    if number := len(list(expiring_soon(view, now_ns))):
        noun = "certificate of a host name expires" if number == 1 else "certificates of host names expire"
        yield f"WARNING: {number} {noun} soon and cannot be renewed (skep certificate ls)"


def certificate_families(view: View) -> list[MetricFamily]:
    """Return the metrics of certificates."""
    if account_in(view) is None:
        return []
    records = [
        (label_text({"name": name}), one) for name, one in records_in(view).items() if one.pem or one.error
    ]
    return [
        MetricFamily(
            "skep_certificate_expires_timestamp_seconds",
            "gauge",
            "Time at which the certificate of a host name expires.",
            [Sample(labels, one.not_after_ns / SECOND_NS) for labels, one in records if one.pem],
        ),
        MetricFamily(
            "skep_certificate_failures",
            "gauge",
            "Failed orders of a host name since its last certificate.",
            [Sample(labels, one.failures) for labels, one in records],
        ),
    ]


def _time(at_ns: int) -> Timestamp:
    return timestamp(at_ns) if at_ns else Timestamp("")
