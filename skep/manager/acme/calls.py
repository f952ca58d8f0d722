"""Calls to an authority from the event loop.  The library waits, so each call runs in a thread."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import structlog

from skep.errors import Unavailable
from skep.manager.acme.dns_hook import DnsHook
from skep.manager.acme.records import AcmeAccount, HostCertificate
from skep.manager.acme.steps import AccountRegistered, AcmeFailed, CertificateIssued, Outcome, RecordsRemoved
from skep.model.values.times import timestamp

log = structlog.get_logger(__name__)

CALL_S = 75.0
"""Time limit in seconds for a call.  The library ends within 60, and then this is never reached."""

T = TypeVar("T")

RunStep = Callable[[AcmeAccount, HostCertificate | None], Awaitable[Outcome]]
"""Registers the account, or sends or continues the order of a name, within a deadline.  Never raises.

TXT records that former orders left are removed before.
"""


async def skip_steps(account: AcmeAccount, record: HostCertificate | None) -> Outcome:
    """Reach no authority.  The simulation has no network."""
    return AcmeFailed(reason="no authority can be reached", is_away=True)


class AuthorityCalls:
    """Makes one call at a time."""

    def __init__(self, hook: DnsHook | None = None) -> None:
        self._hook = hook or DnsHook()
        self._lock = threading.Lock()

    async def run_step(self, account: AcmeAccount, record: HostCertificate | None) -> Outcome:
        """Register the account, send or continue the order of a name, or remove what former ones left.

        For a name without an order, ask when to renew its certificate.
        """
        if record is not None and record.left:
            await self._hook.remove(record.left)
            return RecordsRemoved(record.left)
        order = record.order if record is not None else None
        if order is not None and order.dns and (problem := await self._hook.set(order.dns, order.key)):
            return AcmeFailed(reason=problem)
        return await self._ask(account, record)

    async def _ask(self, account: AcmeAccount, record: HostCertificate | None) -> Outcome:
        def step() -> Outcome:
            # Importing the library takes 9 MiB, which a cluster without certificates does not need.
            from skep.manager.acme.authority import renewal_window, run_step

            if record is None:
                return run_step(account)
            if record.order is None:
                return renewal_window(account, record.pem)
            return run_step(account, record.name, record.order, has_dns=bool(self._hook))

        try:
            return await self._in_thread(step)
        except (Unavailable, TimeoutError) as error:
            return AcmeFailed(reason=str(error) or "the authority did not respond in time", is_away=True)
        except Exception as error:
            name = record.name if record is not None else ""
            log.error("step of a certificate failed", name=name, error=str(error), exc_info=error)
            return AcmeFailed(reason="internal error: see the log of the leader", is_over=True)

    async def terms(self, account: AcmeAccount) -> str | AcmeFailed:
        """Return the URL of the authority's terms of service, or an empty text without any.

        Raises: Unavailable, TimeoutError.
        """

        def fetch() -> str | AcmeFailed:
            from skep.manager.acme.authority import fetch_terms

            return fetch_terms(account)

        return await self._in_thread(fetch)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``.  Its thread is a daemon, so it does not delay the end of the process."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result: T | None = None
            failure: Exception | None = None
            # A cancelled call continues in its thread until its own deadline.
            if self._lock.acquire(timeout=CALL_S):
                try:
                    result = work()
                except Exception as error:
                    failure = error
                finally:
                    self._lock.release()
            else:
                failure = Unavailable("an earlier request to the authority has not ended yet")
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(settle, result, failure)

        threading.Thread(target=run, name="acme", daemon=True).start()
        async with asyncio.timeout(CALL_S):
            return await done


def log_outcome(account: AcmeAccount, record: HostCertificate | None, outcome: Outcome) -> None:
    """Log the outcome of a step for a name, or of a registration, unless it repeats."""
    name = record.name if record is not None else ""
    match outcome:
        case AccountRegistered():
            log.info("account registered", directory=account.directory)
        case CertificateIssued(not_after_ns=not_after_ns):
            log.info("certificate issued", name=name, until=timestamp(not_after_ns))
        case AcmeFailed(is_away=True) if not account.failures:
            log.warning("authority not usable, will retry", error=outcome.reason, name=name)
        case AcmeFailed(is_away=False) if record is None or record.error != outcome.reason:
            log.warning("certificate not issued, will retry", error=outcome.reason, name=name)
