"""Transactions of certificates: the account and renewals by the API, orders and their results by the leader."""

from msgspec.structs import replace

from skep.errors import FailedPrecondition, NotFound
from skep.manager.acme.records import (
    ACCOUNT_ID,
    NAMES_ID,
    AcmeAccount,
    HostCertificate,
    KnownNames,
    account_in,
    record_id,
    record_in,
    records_in,
)
from skep.manager.acme.steps import (
    Outcome,
    RecordsRemoved,
    after_account,
    after_step,
    asked,
    begun,
    dropped,
    present_record,
)
from skep.model.values.times import minute, timestamp
from skep.store.interface import Transaction
from skep.store.kinds import Payload, write_record
from skep.store.level import CERTIFICATES


def configure(tx: Transaction, account: AcmeAccount) -> None:
    """Store an account.  The same authority keeps its present account, so its key and its limits stay.

    Raises: FailedPrecondition: a manager is too old to order certificates.
    """
    if tx.level < CERTIFICATES:
        raise FailedPrecondition("certificates need managers of this version: upgrade the others first")
    present = _account(tx)
    if present is not None and present.directory == account.directory:
        same_email = present.email == account.email
        account = replace(account, key=present.key, url=present.url if same_email else "")
    write_record(tx, ACCOUNT_ID, account)


def ask_for_renewal(tx: Transaction, name: str, now_ns: int) -> None:
    """Let the leader order a new certificate for ``name``.  Raises: NotFound; FailedPrecondition."""
    account = _account(tx)
    if account is None:
        raise FailedPrecondition("no authority is configured: run skep door acme EMAIL")
    if tx.rely_on(Payload, record_id(name)) is None:
        raise NotFound(f"no certificate of the authority for {name}: see skep certificate ls")
    record = present_record(account, records_in(tx), name)
    if record.blocked_until_ns > now_ns:
        until = minute(timestamp(record.blocked_until_ns))
        raise FailedPrecondition(
            f"the authority refuses orders for {name} until {until}: {record.error}. Wait until then."
        )
    write_record(tx, record_id(name), asked(record))


def begin_order(tx: Transaction, name: str, key: str, now_ns: int) -> None:
    """Record a new order before it is sent."""
    account = _account(tx)
    if account is None:
        return
    record = present_record(account, {name: record_in(tx, name)}, name)
    if record.order is None:
        write_record(tx, record_id(name), begun(record, account, key, now_ns))
        _note_name(tx, name, is_known=True)


def drop_order(tx: Transaction, name: str, now_ns: int, *, is_needed: bool = False) -> None:
    """Remove the order of a name that no service has, and its record if that is useless or its place is needed."""
    record = dropped(record_in(tx, name), now_ns, is_needed=is_needed)
    if record is not None:
        write_record(tx, record_id(name), record)
        return
    if tx.rely_on(Payload, record_id(name)) is not None:
        tx.delete(Payload, record_id(name))
    _note_name(tx, name, is_known=False)


def note_outcome(
    tx: Transaction,
    used: AcmeAccount,
    before: HostCertificate | None,
    outcome: Outcome,
    now_ns: int,
    chance: float,
) -> None:
    """Record the result of a step, unless the account or the order was replaced since.

    Args:
        used: The account with which the step was made.
        before: The record for which it was made, or None for a registration.
    """
    if before is not None and isinstance(outcome, RecordsRemoved):  # says nothing about the authority
        if tx.rely_on(Payload, record_id(before.name)) is not None:
            present = record_in(tx, before.name)
            write_record(tx, record_id(present.name), after_step(present, outcome, now_ns, chance))
        return
    if before is not None and before.order is None:  # how a question ends says nothing about the account
        if tx.rely_on(Payload, record_id(before.name)) is not None:
            present = record_in(tx, before.name)
            if present.pem == before.pem and present.order is None:
                write_record(tx, record_id(present.name), after_step(present, outcome, now_ns, chance))
        return
    account = _account(tx)
    if account is None or (account.directory, account.key) != (used.directory, used.key):
        return
    write_record(tx, ACCOUNT_ID, after_account(account, outcome, now_ns, chance))
    if before is None:
        return
    record = record_in(tx, before.name)
    if record.order is not None and before.order is not None and record.order.key == before.order.key:
        write_record(tx, record_id(record.name), after_step(record, outcome, now_ns, chance))


def _account(tx: Transaction) -> AcmeAccount | None:
    tx.rely_on(Payload, ACCOUNT_ID)
    return account_in(tx)


def _note_name(tx: Transaction, name: str, *, is_known: bool) -> None:
    tx.rely_on(Payload, NAMES_ID)
    others = records_in(tx).keys() - {name}
    write_record(tx, NAMES_ID, KnownNames(tuple(sorted(others | {name} if is_known else others))))
