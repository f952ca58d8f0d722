"""Refuses requests for which their client has no role, and removes invisible objects from lists.

Every process that serves the API uses it, with its own ``Objects``.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec
from aiohttp import web
from aiohttp.payload import Payload

from skep.api.access.identity import identity_of
from skep.api.access.permissions import (
    PermissionRule,
    PermissionScope,
    RequestFacts,
    may,
    missing,
    rule_for,
    sees,
    shown_error,
    why_not_image,
    why_not_ps,
)
from skep.api.http.framing import path_of
from skep.errors import NamesAnother, PermissionDenied
from skep.model.permissions.access import EVERY_STACK, Identity, Role
from skep.model.values.stacks import STACK_LABEL

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Objects(Protocol):
    """Looks up the objects that requests concern.  Each process that serves the API has its own."""

    async def facts(self, request: web.Request, rule: PermissionRule) -> RequestFacts:
        """Return the facts about the objects of ``request``.

        Afterwards, ``request.match_info`` has the id of an object that the path names.

        Raises:
            SkepError: The object does not exist, or the body is invalid.
        """

    def stack_of(self, kind: str, item: Mapping[str, Any]) -> str:
        """Return the stack of an object in a list of ``kind``, or an empty text."""


async def respond_if_authorized(
    request: web.Request, handler: Handler, objects: Objects
) -> web.StreamResponse:
    """Return the response to ``request`` if its client may send it.

    Raises:
        PermissionDenied: The client may not send it.
        NotFound: The client may not read objects of the kind (see ``missing``).
        SkepError: An error of ``Objects.facts``.
    """
    resource = request.match_info.route.resource
    if request.match_info.http_exception is not None or resource is None:
        return await handler(request)  # no route has this path, so the handler returns 404
    identity = identity_of(request)
    if identity.is_admin:
        return await handler(request)
    rule = rule_for(request.method, resource.canonical)
    why = may(identity, rule)
    if why is None and _needs_facts(identity, rule):
        why = may(identity, rule, await objects.facts(request, rule))
    if why is None and resource.canonical.endswith("/top"):
        why = next(filter(None, map(why_not_ps, request.query.getall("ps_args", ()))), None)
    if why is None and resource.canonical.startswith("/distribution/"):
        why = why_not_image(request.match_info["name"]) or None
    if why is not None:
        if (error := missing(rule, request.match_info.get("name", ""), why)) is not None:
            raise error
        raise PermissionDenied(f"{identity.name} may not {request.method} {path_of(request.path)}: {why}")
    try:
        response = await handler(request)
    except NamesAnother as error:
        raise shown_error(identity, error) from error
    if (
        rule.scope is PermissionScope.LIST
        and identity.role_in(EVERY_STACK) is None
        and response.status == 200
    ):
        assert isinstance(response, web.Response), "lists are documents"
        return await _filter(response, identity, rule.kind, objects)
    return response


def stack_label_of(item: Mapping[str, Any]) -> str:
    """Return the stack in an object's JSON, from its labels or its spec's labels."""
    labels = item.get("Labels") or (item.get("Spec") or {}).get("Labels") or {}
    return str(labels.get(STACK_LABEL) or "")


def _needs_facts(identity: Identity, rule: PermissionRule) -> bool:
    if rule.scope not in (PermissionScope.OBJECT, PermissionScope.NEW, PermissionScope.CHANGE):
        return False
    return rule.role is Role.OPERATOR or identity.role_in(EVERY_STACK) is None


async def _filter(
    response: web.Response, identity: Identity, kind: str, objects: Objects
) -> web.StreamResponse:
    """Return ``response``, a list or a document with a list, without objects that ``identity`` may not see."""
    body = response.body
    found = msgspec.json.decode(await body.as_bytes() if isinstance(body, Payload) else body or b"[]")

    def shown(items: Any) -> list[Any]:
        # Warnings about volume plug-ins are texts, and belong to no stack.
        objects_only = (one for one in items or () if isinstance(one, dict))
        return [one for one in objects_only if sees(identity, objects.stack_of(kind, one))]

    if isinstance(found, dict):  # the list of volumes is inside an object, next to warnings
        found = {key: shown(value) if isinstance(value, list) else None for key, value in found.items()}
    else:
        found = shown(found)
    return web.Response(body=msgspec.json.encode(found) + b"\n", content_type="application/json")
