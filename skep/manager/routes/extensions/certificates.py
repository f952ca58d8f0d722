"""``/skep/certificates``: certificates of host names, for administrators only.  ``/skep/door``: routes and requests.

Both are Skep extensions.
"""

import re
import ssl
from functools import partial
from urllib.parse import urlsplit

from aiohttp import web

from skep.aio.time_slices import result_in_slices
from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.http.server import Routes, json_response, read_json
from skep.errors import FailedPrecondition, InvalidArgument, Unavailable
from skep.manager.acme.calls import AuthorityCalls
from skep.manager.acme.own_certificates import refuse_own_certificate
from skep.manager.acme.records import AcmeAccount
from skep.manager.acme.showing import shown_certificates
from skep.manager.acme.steps import AcmeFailed
from skep.manager.acme.writing import ask_for_renewal, configure
from skep.manager.routes.access import current_view, manager_of
from skep.manager.services.routes import shown_routes
from skep.model.options.certificates import AuthorityRequest
from skep.model.values.times import Timestamp
from skep.security.keys import new_private_key, private_pem

routes = Routes()

URL_CHARACTERS_MAX = 2048
"""Longest URL of a directory.  Servers refuse longer ones."""
ROOTS_CHARACTERS_MAX = 256 * 1024
"""Longest bundle of roots, which has a few certificates of 2 KiB."""
_EMAIL = re.compile(r"[A-Za-z0-9.!#$%&*+/=?^_{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}")


@routes.get("/skep/certificates")
async def list_certificates(request: web.Request) -> web.StreamResponse:
    """List the authority and all names."""
    view = await current_view(request)
    return json_response(shown_certificates(view, manager_of(request).clock.now_ns()))


@routes.get("/skep/door")
async def list_routes(request: web.Request) -> web.StreamResponse:
    """List the routes that the user sees, with their recent requests.

    Administrators also see when certificates expire.
    """
    view, manager, identity = await current_view(request), manager_of(request), identity_of(request)
    ends: dict[str, Timestamp] = {}
    if identity.is_admin:
        shown = shown_certificates(view, manager.clock.now_ns())
        ends = {one.name: one.not_after for one in shown.certificates}
    work = shown_routes(
        view,
        partial(sees, identity),
        await manager.collect_routes(),
        lambda host: ends.get(host, Timestamp("")),
    )
    return json_response(await result_in_slices(work, manager.clock))


@routes.post("/skep/certificates/authority")
async def set_authority(request: web.Request) -> web.StreamResponse:
    """Set the authority.  The leader then registers an account there."""
    manager = manager_of(request)
    wanted = await read_json(request, AuthorityRequest)
    _check(wanted)
    account = AcmeAccount(
        email=wanted.email,
        directory=wanted.directory,
        roots=wanted.roots,
        key=private_pem(new_private_key()).decode(),
    )
    if not wanted.agree_tos:
        await _require_no_terms(account)
    await manager.require_room(creates=True)
    await manager.update(configure, account)
    return web.Response(status=204)


@routes.post("/skep/certificates/{name}/renew")
async def renew_certificate(request: web.Request) -> web.StreamResponse:
    """Let the leader order a new certificate now."""
    manager, name = manager_of(request), request.match_info["name"].lower()
    refuse_own_certificate(await current_view(request), name)
    await manager.update(ask_for_renewal, name, manager.clock.now_ns())
    return web.Response(status=204)


def _check(wanted: AuthorityRequest) -> None:
    """Check the values of a request.  Raises: InvalidArgument."""
    if not _EMAIL.fullmatch(wanted.email):
        raise InvalidArgument(f"{wanted.email!r} is not a mail address")
    try:
        parts = urlsplit(wanted.directory)
        is_valid = parts.scheme == "https" and bool(parts.hostname) and parts.username is None
    except ValueError:
        is_valid = False
    is_short = len(wanted.directory) <= URL_CHARACTERS_MAX and len(wanted.roots) <= ROOTS_CHARACTERS_MAX
    if not is_valid or not is_short or not wanted.directory.isascii() or not wanted.directory.isprintable():
        raise InvalidArgument("the directory of an authority is a URL of the form https://HOST/PATH")
    if wanted.roots:
        try:
            ssl.create_default_context(cadata=wanted.roots)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidArgument(
                f"the authority's roots are no certificates in PEM form: {error}"
            ) from error


async def _require_no_terms(account: AcmeAccount) -> None:
    """Refuse an authority with terms of service.  Raises: FailedPrecondition, Unavailable."""
    try:
        terms = await AuthorityCalls().terms(account)
    except TimeoutError as error:
        raise Unavailable("the authority did not respond in time") from error
    if isinstance(terms, AcmeFailed):
        raise Unavailable(f"{account.directory}: {terms.reason}")
    if terms:
        raise FailedPrecondition(
            f"the authority has terms of service: {terms} . Read them, and repeat the command with --agree-tos."
        )
