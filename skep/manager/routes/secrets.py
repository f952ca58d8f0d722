"""``/secrets``.  What is in them is never shown.

Source: moby 20.10, daemon/cluster/secrets.go; swarmkit, manager/controlapi/secret.go.
"""

from aiohttp import web

from skep.api.server import ApiVersion, Filters, Routes, api_version, json_answer, json_list_answer, read_json
from skep.errors import InvalidArgument
from skep.manager.control import files as control
from skep.manager.routes.access import current_view, manager_of, version_parameter
from skep.manager.routes.shown import has_labels
from skep.model.encoding import ApiObject
from skep.model.secret import Secret, SecretSpec

routes = Routes()

_TEMPLATING = ApiVersion("1.37")


class _SecretBody(SecretSpec):
    """A secret as a client sends it, with its data."""

    __go_name__ = "swarm.SecretSpec"

    data: bytes | None = None

    @property
    def spec(self) -> SecretSpec:
        """What is kept where it can be seen."""
        return SecretSpec(name=self.name, labels=self.labels, driver=self.driver, templating=self.templating)


class Created(ApiObject):
    """Answer to a creation."""

    id: str


@routes.get("/secrets")
async def list_secrets(request: web.Request) -> web.StreamResponse:
    """All secrets that fit the filters; of names and ids one has to fit."""
    filters = Filters.of(request)
    filters.refuse_unknown("names", "name", "id", "label")
    view = await current_view(request)
    return json_list_answer([secret for secret in view.find(Secret) if _fits(secret, filters)])


def _fits(secret: Secret, filters: Filters) -> bool:
    name = secret.spec.name
    is_named = not (filters["names"] or filters["name"] or filters["id"]) or (
        name in filters["names"]
        or name.startswith(filters["name"] or ("\0",))
        or secret.id.startswith(filters["id"] or ("\0",))
    )
    return is_named and has_labels(secret.spec.labels, filters["label"])


@routes.post("/secrets/create")
async def create_secret(request: web.Request) -> web.StreamResponse:
    """Create a secret."""
    manager = manager_of(request)
    body = await read_json(request, _SecretBody)
    version = api_version(request)
    if body.templating is not None and version < _TEMPLATING:
        raise InvalidArgument(f"secret templating is not supported on the specified API version: {version}")
    secret = await manager.update(
        control.create_secret, body.spec, body.data or b"", new_id=manager.new_id, now=manager.now()
    )
    return json_answer(Created(id=secret.id), 201)


@routes.get("/secrets/{id}")
async def inspect_secret(request: web.Request) -> web.StreamResponse:
    """One secret, without its data."""
    view = await current_view(request)
    return json_answer(view.resolve(Secret, request.match_info["id"]))


@routes.post("/secrets/{id}/update")
async def update_secret(request: web.Request) -> web.StreamResponse:
    """Change the labels of a secret."""
    body = await read_json(request, _SecretBody)
    version = _version(request)
    secret = (await current_view(request)).resolve(Secret, request.match_info["id"])
    await manager_of(request).update(control.update_secret, secret.id, body.spec, body.data, version)
    return web.Response()


def _version(request: web.Request) -> int:
    try:
        return version_parameter(request, "secret")
    except InvalidArgument:
        raise InvalidArgument("invalid secret version") from None


@routes.delete("/secrets/{id}")
async def remove_secret(request: web.Request) -> web.StreamResponse:
    """Remove a secret that no service uses."""
    secret = (await current_view(request)).resolve(Secret, request.match_info["id"])
    await manager_of(request).update(control.remove_secret, secret.id)
    return web.Response(status=204)
