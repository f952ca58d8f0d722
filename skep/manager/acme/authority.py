"""Steps of an order at a real authority, with the library ``acme``.

The library waits in the thread that calls it.  Each step is a few requests, runs in a thread of its own, and has one
deadline for all of them.  This module is imported at the first step, because most clusters never need the library.
"""

import ssl
from email.utils import parsedate_to_datetime
from typing import Any

import requests
import structlog
from acme import challenges, crypto_util, errors, messages
from acme.client import ClientNetwork, ClientV2
from cryptography import x509
from josepy.errors import Error as JoseError
from josepy.jwa import ES256
from josepy.jwk import JWKEC
from requests.adapters import HTTPAdapter

from skep import __version__
from skep.aio.clock import SystemClock
from skep.manager.acme.records import AcmeAccount, CertificateOrder
from skep.manager.acme.steps import (
    ASK_S,
    LIMITED_S,
    LOOK_S,
    LOOK_S_MAX,
    RETRY_AFTER_S_MAX,
    AccountRegistered,
    AcmeFailed,
    CertificateIssued,
    OrderOpened,
    OrderPending,
    Outcome,
    WindowKnown,
)
from skep.model.history import cut
from skep.model.task_end import on_one_line
from skep.model.values.times import SECOND_NS
from skep.security.keys import load_private_key

log = structlog.get_logger(__name__)

STEP_S = 60.0
"""Time limit in seconds for all requests of a step.  Authorities respond within a few."""
_WAIT_S = 15.0
"""Time limit in seconds for a connection, and for each part of a response."""
_RESPONSE_BYTES_MAX = 256 * 1024
"""Longest response.  A chain of certificates has about 6 KiB."""
_PART_BYTES = 16 * 1024
"""Part of a response that is read at once."""
_NONCES_MAX = 10
"""Attempts of a request whose nonce is refused.  Authorities forget nonces, but rarely the one they just gave."""
_REASON_CHARACTERS_MAX = 300
"""Longest reason of a failure.  An authority quotes what a validated server responded."""
_AWAY = {"badNonce", "serverInternal"}
"""Errors that say nothing about the order."""


class _Refused(Exception):
    """Raised for a response that is too long or too late."""


class AuthorityClient(ClientV2):
    """A connection to one authority for one step."""

    def __init__(self, account: AcmeAccount, step_s: float = STEP_S) -> None:
        self.network = _Network(account, step_s)
        super().__init__(self.get_directory(account.directory, self.network), self.network)

    def terms(self) -> str:
        """Return the URL of the terms of service, or an empty text without any."""
        return str(getattr(self.directory.meta, "terms_of_service", "") or "")

    def order(self, url: str) -> tuple[messages.Order, float]:
        """Return the state of an order, and the ``Retry-After`` of the response in seconds."""
        body = messages.Order.from_json(self._post_as_get(url).json())
        return body, self.network.retry_after_s

    def authorization(self, url: str) -> messages.AuthorizationResource:
        """Return the state of an authorization."""
        return self._authzr_from_response(self._post_as_get(url), uri=url)

    def new_order_for(self, name: str) -> tuple[str, messages.Order]:
        """Send a new order.  Returns its URL and state."""
        identifier = messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=name)
        response = self._post(self.directory["newOrder"], messages.NewOrder(identifiers=[identifier]))
        return response.headers["Location"], messages.Order.from_json(response.json())

    def chain(self, url: str) -> str:
        """Return the certificate and its chain (PEM)."""
        return self._post_as_get(url).text


def fetch_terms(account: AcmeAccount) -> str | AcmeFailed:
    """Return the URL of the authority's terms of service, or an empty text without any."""
    try:
        return AuthorityClient(account).terms()
    except _FAILURES as error:
        return _failure(error, None)


def run_step(
    account: AcmeAccount, name: str = "", order: CertificateOrder | None = None, *, has_dns: bool = False
) -> Outcome:
    """Register the account, or send or continue the order of a name.  Waits for the authority.

    Args:
        has_dns: Whether this manager can write DNS records.
    """
    client = None
    try:
        client = AuthorityClient(account)
        if order is None:
            return _register(client, account)
        return _continue(client, name, order) if order.url else _open(client, name, has_dns)
    except _FAILURES as error:
        return _failure(error, client)


def renewal_window(account: AcmeAccount, pem: str) -> WindowKnown:
    """Ask when to renew a certificate (RFC 9773).  Failures only delay the next question.

    The library draws a time from the suggested window.
    """
    try:
        client = AuthorityClient(account)
        if "renewalInfo" not in client.directory.to_partial_json():
            return WindowKnown(None, RETRY_AFTER_S_MAX)
        at, _ = client.renewal_time(pem.encode())
        return WindowKnown(
            int(at.timestamp() * SECOND_NS) if at is not None else None, client.network.retry_after_s or ASK_S
        )
    except Exception as error:  # the library computes with what the authority suggests, so anything may fail
        log.info("authority not asked when to renew, will retry", error=_words(error))
        return WindowKnown(None, ASK_S)


def _register(client: AuthorityClient, account: AcmeAccount) -> Outcome:
    wanted = messages.NewRegistration.from_data(email=account.email or None, terms_of_service_agreed=True)
    try:
        return AccountRegistered(url=client.new_account(wanted).uri)
    except errors.ConflictError as error:  # it was registered before, perhaps with another email
        known = messages.RegistrationResource(body=wanted, uri=error.location)
        return AccountRegistered(url=client.update_registration(known).uri)


def _open(client: AuthorityClient, name: str, has_dns: bool) -> Outcome:
    if name.startswith("*.") and not has_dns:
        return AcmeFailed(
            reason="a certificate of a wildcard needs DNS-01. Set acme-dns-hook on every manager",
            is_over=True,
        )
    url, body = client.new_order_for(name)
    answers: dict[str, str] = {}
    records: dict[str, str] = {}
    key = client.network.account_key
    for authorization in map(client.authorization, body.authorizations):
        if authorization.body.status == messages.STATUS_VALID:
            continue
        host = authorization.body.identifier.value
        if (challenge := _challenge(authorization, challenges.HTTP01)) is not None:
            answers[challenge.chall.encode("token")] = challenge.chall.key_authorization(key)
        elif has_dns and (challenge := _challenge(authorization, challenges.DNS01)) is not None:
            records[challenge.chall.validation_domain_name(host)] = challenge.chall.validation(key)
        else:
            offered = ", ".join(sorted(one.chall.typ for one in authorization.body.challenges)) or "nothing"
            return AcmeFailed(
                reason=f"the authority offers {offered}. Skep answers http-01, and dns-01 by acme-dns-hook",
                is_over=True,
            )
    return OrderOpened(url=url, challenges=answers, dns=records)


def _continue(client: AuthorityClient, name: str, order: CertificateOrder) -> Outcome:
    body, retry_after_s = client.order(order.url)
    look_after_s = min(max(retry_after_s, LOOK_S), LOOK_S_MAX)
    if body.status == messages.STATUS_PENDING:
        kind = challenges.DNS01 if order.dns else challenges.HTTP01
        for authorization in map(client.authorization, body.authorizations):
            challenge = _challenge(authorization, kind)
            if challenge is not None and challenge.status == messages.STATUS_PENDING:
                client.answer_challenge(challenge, challenge.response(client.network.account_key))
        return OrderPending(look_after_s)
    if body.status == messages.STATUS_READY:
        request = crypto_util.make_csr(order.key.encode(), [name])
        opened = messages.OrderResource(body=body, uri=order.url, csr_pem=request)
        body = client.begin_finalization(opened).body
    if body.status == messages.STATUS_VALID:
        return _issued(client.chain(body.certificate or ""), name, order)
    if body.status == messages.STATUS_INVALID:
        return AcmeFailed(reason=_why_invalid(client, body), is_over=True)
    return OrderPending(look_after_s)


def _challenge(
    authorization: messages.AuthorizationResource, kind: type[challenges.KeyAuthorizationChallenge]
) -> messages.ChallengeBody | None:
    found = (one for one in authorization.body.challenges if isinstance(one.chall, kind))
    return next(found, None)


def _why_invalid(client: AuthorityClient, body: messages.Order) -> str:
    """Return the reason from the challenge that failed, which says more than the order."""
    for authorization in map(client.authorization, body.authorizations):
        for challenge in authorization.body.challenges:
            if challenge.error is not None:
                return _words(challenge.error)
    return _words(body.error) if body.error is not None else "the authority ended the order without a reason"


def _issued(chain: str, name: str, order: CertificateOrder) -> Outcome:
    """Check the name and key of the certificate."""
    certificate = x509.load_pem_x509_certificates(chain.encode())[0]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if name not in names.get_values_for_type(x509.DNSName):
        return AcmeFailed(reason="the authority issued a certificate for another name", is_over=True)
    if certificate.public_key() != load_private_key(order.key.encode()).public_key():
        return AcmeFailed(reason="the authority issued a certificate for another key", is_over=True)
    return CertificateIssued(
        chain=chain,
        not_before_ns=int(certificate.not_valid_before_utc.timestamp()) * SECOND_NS,
        not_after_ns=int(certificate.not_valid_after_utc.timestamp()) * SECOND_NS,
    )


_FAILURES = (
    errors.Error,
    JoseError,
    requests.RequestException,
    OSError,
    KeyError,
    TypeError,
    ValueError,
    x509.ExtensionNotFound,
    _Refused,
)
"""Errors of the library, including errors in malformed responses."""


def _failure(error: Exception, client: AuthorityClient | None) -> AcmeFailed:
    retry_after_s, status = (client.network.retry_after_s, client.network.status) if client else (0.0, 0)
    if not isinstance(error, messages.Error):
        return AcmeFailed(reason=_words(error), retry_after_s=retry_after_s, is_away=True)
    reason, code = _words(error), error.code or ""
    if code == "accountDoesNotExist":
        return AcmeFailed(reason=reason, is_unknown=True)
    if status == 503 or code in _AWAY:
        return AcmeFailed(reason=reason, retry_after_s=retry_after_s, is_away=True)
    if code == "rateLimited":
        return AcmeFailed(reason=reason, retry_after_s=retry_after_s or LIMITED_S)
    return AcmeFailed(reason=reason, retry_after_s=retry_after_s, is_over=True)


def _words(error: Exception) -> str:
    """Return an error as one line of bounded length."""
    if isinstance(error, messages.Error):
        parts = (error.description or error.title or error.code, error.detail)
        text = ": ".join(str(part) for part in parts if part)
    elif isinstance(error, requests.ConnectTimeout | requests.ReadTimeout):
        text = "the authority did not respond in time"
    elif isinstance(error, requests.exceptions.SSLError):
        text = f"the authority's own certificate is not trusted: {error}"
    elif isinstance(error, requests.ConnectionError):
        text = f"the authority cannot be reached: {error}"
    else:
        text = f"the authority gave an unusable response: {error or type(error).__name__}"
    return cut(on_one_line(text), _REASON_CHARACTERS_MAX)


class _Network(ClientNetwork):
    """The library's network, with more attempts for nonces, and the status of failed responses."""

    def __init__(self, account: AcmeAccount, step_s: float) -> None:
        key = JWKEC(key=load_private_key(account.key.encode()))
        known = messages.RegistrationResource(body=messages.Registration(), uri=account.url)
        super().__init__(key, known if account.url else None, ES256, user_agent=f"skep/{__version__}")
        self.session = _Session(account.roots, step_s)
        self.account_key = key
        self.retry_after_s = 0.0
        self.status = 0

    def post(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Post a signed request, again if its nonce is refused."""
        for _ in range(_NONCES_MAX - 1):
            try:
                return self._post_once(*args, **kwargs)
            except messages.Error as error:
                if error.code != "badNonce":
                    raise
        return self._post_once(*args, **kwargs)

    def _send_request(self, method: str, url: str, *args: Any, **kwargs: Any) -> requests.Response:
        self.status, self.retry_after_s = 0, 0.0
        response = super()._send_request(method, url, *args, **kwargs)
        self.status, self.retry_after_s = response.status_code, _retry_after_s(response)
        return response


class _Session(requests.Session):
    """Requests with one deadline for all of them, and responses of bounded length."""

    def __init__(self, roots: str, step_s: float) -> None:
        super().__init__()
        self._clock = SystemClock()
        self._ends_at = self._clock.monotonic() + step_s
        self.mount("https://", _Adapter(roots))

    def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> requests.Response:  # type: ignore[override]
        """Send a request and read its response."""
        wait_s = min(_WAIT_S, self._left_s())
        kwargs |= {"stream": True, "allow_redirects": False, "timeout": (wait_s, wait_s)}
        response = super().request(method, url, *args, **kwargs)
        with response:
            data = bytearray()
            for part in response.iter_content(_PART_BYTES):
                data += part
                if len(data) > _RESPONSE_BYTES_MAX:
                    raise _Refused("it is too long")
                self._left_s()
        response._content = bytes(data)  # what ``content`` returns, read with bounds
        return response

    def _left_s(self) -> float:
        left_s = self._ends_at - self._clock.monotonic()
        if left_s <= 0:
            raise _Refused("it took too long")
        return left_s


class _Adapter(HTTPAdapter):
    """TLS with the system's roots, or with given ones.  The library would use roots of its own."""

    def __init__(self, roots: str) -> None:
        self._context = ssl.create_default_context(cadata=roots or None)
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Create the pool of direct connections."""
        super().init_poolmanager(*args, **kwargs, ssl_context=self._context)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Return the pool of connections by a proxy."""
        return super().proxy_manager_for(proxy, **kwargs, ssl_context=self._context)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Keep what the context says."""


def _retry_after_s(response: requests.Response) -> float:
    """Return the seconds of ``Retry-After``, or 0.  A date counts from the authority's own time."""
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        until, now = (parsedate_to_datetime(one) for one in (text, response.headers.get("Date", "")))
        return max((until - now).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return 0.0
