"""``/skep/users``: users of the API, their tokens and certificates.  ``/skep/access``: the client's identity.

Skep extensions.  On the manager's own socket only, ``/_skep/access`` sends the node process the users whenever they
change.
"""

import asyncio
from contextlib import suppress

from aiohttp import web
from msgspec.structs import replace

from skep.api.access.identity import identity_of
from skep.api.http.server import JsonLines, Routes, json_list_response, json_response, read_json
from skep.errors import InvalidArgument
from skep.manager.control import users as control
from skep.manager.routes.access import ManagerApi, current_view, manager_of
from skep.model.permissions.access import ROLE_HEADER, Identity, Origin
from skep.model.permissions.user import AccessTable, User, UserSpec
from skep.model.values.encoding import ApiObject, always
from skep.model.values.times import ZERO_TIME, Timestamp
from skep.security.authority import Authority
from skep.store.kinds import Payload

routes = Routes()

BEAT_S = 2.0
"""Seconds between two messages to the node process, even if nothing changes."""
TOKEN_S = 90 * 86400
"""Default lifetime of a token: 90 days."""
CERTIFICATE_S = 30 * 86400
"""Default lifetime of a user's certificate: 30 days."""


class NewToken(ApiObject):
    """Body of a request for a token, which is valid for 90 days if ``lifetime_seconds`` is 0."""

    lifetime_seconds: int = 0
    logs_in_only: bool = False
    """Whether the token only opens the dashboard."""


class IssuedToken(ApiObject):
    """The only response that ever shows a token."""

    id: str
    token: str
    not_after: Timestamp = always(ZERO_TIME)


class NewCertificate(ApiObject):
    """Body of a request for a certificate: ``request`` is in PEM, and 0 ``lifetime_seconds`` mean 30 days."""

    request: str = ""
    lifetime_seconds: int = 0


class IssuedCertificate(ApiObject):
    """Response with a certificate in PEM."""

    user: str
    serial: str
    certificate: str
    not_after: Timestamp = always(ZERO_TIME)


class Access(ApiObject):
    """The identity of a request."""

    name: str
    origin: str
    roles: tuple[str, ...] = always(())
    limit: str = ""
    """The role in the request's header ``X-Skep-Role``."""


@routes.get("/skep/access")
async def show_access(request: web.Request) -> web.StreamResponse:
    """Show the client's identity and its roles."""
    identity = identity_of(request)
    roles = tuple(map(str, identity.bindings))
    limit = request.headers.get(ROLE_HEADER, "")
    return json_response(Access(name=identity.name, origin=identity.origin.value, roles=roles, limit=limit))


@routes.post("/skep/access/certificates")
async def renew_own(request: web.Request) -> web.StreamResponse:
    """Issue another certificate to a user who authenticates by certificate.

    A token is not enough, because the certificate would stay valid after the token's removal.  The default and maximum
    of ``lifetime_seconds`` is the lifetime of the client's present certificate.
    """
    identity: Identity = identity_of(request)
    if identity.origin is not Origin.CERTIFICATE:
        raise InvalidArgument("only a user with a certificate of the cluster can renew it")
    return await _issue(request, identity.name, identity.serial)


@routes.get("/skep/users")
async def list_users(request: web.Request) -> web.StreamResponse:
    """List all users."""
    return json_list_response([_shown(user) for user in (await current_view(request)).find(User)])


@routes.post("/skep/users/create")
async def create_user(request: web.Request) -> web.StreamResponse:
    """Create a user."""
    manager = manager_of(request)
    spec = await read_json(request, UserSpec)
    await manager.require_room(creates=True)
    user = await manager.update(control.create_user, spec, new_id=manager.new_id, now=manager.now())
    return json_response(_shown(user), 201)


@routes.get("/skep/users/{id}")
async def inspect_user(request: web.Request) -> web.StreamResponse:
    """Show one user."""
    return json_response(_shown(await _find_user(request)))


@routes.post("/skep/users/{id}/update")
async def update_user(request: web.Request) -> web.StreamResponse:
    """Replace the roles of a user.  Open connections with other roles end."""
    manager = manager_of(request)
    spec, user = await read_json(request, UserSpec), await _find_user(request)
    changed = await manager.update(control.set_roles, user.id, spec.roles, now=manager.now())
    return json_response(_shown(changed))


@routes.delete("/skep/users/{id}")
async def remove_user(request: web.Request) -> web.StreamResponse:
    """Remove a user.  Its connections end."""
    user = await _find_user(request)
    await manager_of(request).update(control.remove_user, user.id)
    return web.Response(status=204)


@routes.post("/skep/users/{id}/tokens")
async def create_token(request: web.Request) -> web.StreamResponse:
    """Create a token for a user."""
    manager = manager_of(request)
    body, user = await read_json(request, NewToken), await _find_user(request)
    token = control.new_token()
    changed = await manager.update(
        control.add_token,
        user.id,
        token,
        body.lifetime_seconds or TOKEN_S,
        logs_in_only=body.logs_in_only,
        new_id=manager.new_id,
        now=manager.now(),
    )
    added = changed.tokens[-1]
    return json_response(IssuedToken(id=added.id, token=token, not_after=added.not_after), 201)


@routes.delete("/skep/users/{id}/tokens/{token}")
async def remove_token(request: web.Request) -> web.StreamResponse:
    """Remove a token of a user.  Its connections end."""
    manager = manager_of(request)
    user = await _find_user(request)
    await manager.update(control.remove_token, user.id, request.match_info["token"], now=manager.now())
    return web.Response(status=204)


@routes.post("/skep/users/{id}/certificates")
async def create_certificate(request: web.Request) -> web.StreamResponse:
    """Issue a certificate for a user."""
    return await _issue(request, request.match_info["id"])


@routes.get("/_skep/access")
async def follow_access(request: web.Request) -> web.StreamResponse:
    """Send lines of ``AccessTable``: at once, whenever users change, and every 2 s."""
    manager = manager_of(request)
    changed = asyncio.Event()
    async with JsonLines(request) as lines, asyncio.TaskGroup() as group:
        group.create_task(_watch(manager, changed), name="users watched")
        while request.transport is not None:  # until the node process disconnects
            changed.clear()
            await lines.send(_table(manager))
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await changed.wait()
    return lines.response


async def _watch(manager: ManagerApi, changed: asyncio.Event) -> None:
    async with manager.store.watch(User, Payload) as watch:
        changed.set()
        async for _ in watch:
            changed.set()


def _table(manager: ManagerApi) -> AccessTable:
    return control.access_table(manager.store.view(), is_current=manager.quorum().has_leader)


async def _find_user(request: web.Request) -> User:
    return (await current_view(request)).resolve(User, request.match_info["id"])


async def _issue(request: web.Request, word: str, renewed: str | None = None) -> web.StreamResponse:
    """Issue a certificate.  ``renewed`` is the serial number of the user's own certificate, or None for an
    administrator.
    """
    manager = manager_of(request)
    body = await read_json(request, NewCertificate)
    user = (await current_view(request)).resolve(User, word)
    fresh, csr = Authority.create(name=control.ROOT_NAME), body.request.encode()
    lifetime_s, now = body.lifetime_seconds, manager.now()
    if renewed is None:
        changed, certificate, _ = await manager.update(
            control.add_certificate, user.id, csr, lifetime_s or CERTIFICATE_S, fresh, now=now
        )
    else:
        changed, certificate, _ = await manager.update(
            control.renew_certificate, user.id, renewed, csr, lifetime_s, fresh, now=now
        )
    added = changed.certificates[-1]
    return json_response(
        IssuedCertificate(
            user=changed.spec.name,
            serial=added.serial,
            certificate=certificate.decode(),
            not_after=added.not_after,
        ),
        201,
    )


def _shown(user: User) -> User:
    return replace(user, tokens=tuple(replace(one, digest="") for one in user.tokens))
