"""``/secrets`` and ``/configs``: files of the cluster.  The data of a secret is never shown.

Source: moby 20.10, daemon/cluster/{secrets,configs}.go; swarmkit, manager/controlapi/{secret,config}.go.
"""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from aiohttp import web

from skep.api.access.identity import identity_of
from skep.api.http.server import (
    ApiVersion,
    Filters,
    Routes,
    api_version,
    json_list_response,
    json_response,
    read_json,
)
from skep.errors import InvalidArgument
from skep.manager.control import files as control
from skep.manager.control.quotas import bounded
from skep.manager.routes.access import current_view, manager_of, version_parameter
from skep.manager.routes.guard.strict_freezes import unfrozen
from skep.manager.routes.representations import has_labels
from skep.manager.services.quotas import usage_of_others
from skep.model.options.labels import STACK_REVISION
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.values.encoding import ApiObject
from skep.model.values.stacks import stack_of
from skep.store.interface import Transaction

routes = Routes()

P = ParamSpec("P")

File = TypeVar("File", Secret, Config)
_TEMPLATING = ApiVersion("1.37")


class SecretBody(SecretSpec):
    """A secret as a client sends it, with its data."""

    __go_name__ = "swarm.SecretSpec"

    data: bytes | None = None

    @property
    def spec(self) -> SecretSpec:
        """The spec without the data."""
        return SecretSpec(name=self.name, labels=self.labels, driver=self.driver, templating=self.templating)


class CreatedFile(ApiObject):
    """Response to a creation."""

    id: str


# --- secrets --------------------------------------------------------------------------------------------------------


@routes.get("/secrets")
async def list_secrets(request: web.Request) -> web.StreamResponse:
    """List the secrets that match the filters.  Of the name and id filters, one must match."""
    return await _list_files(request, Secret, "names", "name", "id", "label")


@routes.post("/secrets/create")
async def create_secret(request: web.Request) -> web.StreamResponse:
    """Create a secret."""
    manager = manager_of(request)
    body = await read_json(request, SecretBody)
    _refuse_templating(request, body, "secret")
    await manager.require_room(creates=True)
    create = _bounded(control.create_secret, request, body.spec)
    secret = await manager.update(
        create, body.spec, body.data or b"", new_id=manager.new_id, now=manager.now()
    )
    return json_response(CreatedFile(id=secret.id), 201)


@routes.get("/secrets/{id}")
async def inspect_secret(request: web.Request) -> web.StreamResponse:
    """Show one secret, without its data."""
    return json_response(await _find_file(request, Secret))


@routes.post("/secrets/{id}/update")
async def update_secret(request: web.Request) -> web.StreamResponse:
    """Change the labels of a secret."""
    body = await read_json(request, SecretBody)
    version = _version(request, "secret")
    secret = await _find_file(request, Secret)
    await manager_of(request).update(control.update_secret, secret.id, body.spec, body.data, version)
    return web.Response()


@routes.delete("/secrets/{id}")
async def remove_secret(request: web.Request) -> web.StreamResponse:
    """Remove a secret that no service uses."""
    secret = await _find_file(request, Secret)
    await manager_of(request).update(control.remove_secret, secret.id)
    return web.Response(status=204)


# --- configs --------------------------------------------------------------------------------------------------------


@routes.get("/configs")
async def list_configs(request: web.Request) -> web.StreamResponse:
    """List the configs that match the filters.  Of the name and id filters, one must match."""
    return await _list_files(request, Config, "name", "id", "label")


@routes.post("/configs/create")
async def create_config(request: web.Request) -> web.StreamResponse:
    """Create a config."""
    manager = manager_of(request)
    spec = await read_json(request, ConfigSpec)
    _refuse_templating(request, spec, "config")
    await manager.require_room(creates=True)
    if STACK_REVISION in spec.labels:
        # The transaction marks deploys in progress, so this view must include deploys that other managers served.
        await current_view(request)
    create = _bounded(control.create_config, request, spec)
    config = await manager.update(
        # Each deploy begins with the record of its revision.
        unfrozen(request, create, stack_of(spec.labels)) if STACK_REVISION in spec.labels else create,
        spec,
        new_id=manager.new_id,
        now=manager.now(),
        writer=identity_of(request),
    )
    return json_response(CreatedFile(id=config.id), 201)


@routes.get("/configs/{id}")
async def inspect_config(request: web.Request) -> web.StreamResponse:
    """Show one config with its data."""
    return json_response(await _find_file(request, Config))


@routes.post("/configs/{id}/update")
async def update_config(request: web.Request) -> web.StreamResponse:
    """Change the labels of a config."""
    spec = await read_json(request, ConfigSpec)
    version = _version(request, "config")
    config = await _find_file(request, Config)
    await manager_of(request).update(
        control.update_config, config.id, spec, version, writer=identity_of(request)
    )
    return web.Response()


@routes.delete("/configs/{id}")
async def remove_config(request: web.Request) -> web.StreamResponse:
    """Remove a config that no service uses."""
    config = await _find_file(request, Config)
    await manager_of(request).update(control.remove_config, config.id)
    return web.Response(status=204)


# --- both -----------------------------------------------------------------------------------------------------------


async def _list_files(request: web.Request, kind: type[File], *known: str) -> web.StreamResponse:
    filters = Filters.of(request)
    filters.refuse_unknown(*known)
    view = await current_view(request)
    return json_list_response([file for file in view.find(kind) if _fits(file, filters)])


def _fits(file: Secret | Config, filters: Filters) -> bool:
    """Return whether a file matches the filters.  Names match in any case: SwarmKit's name index is in lower case.

    Source: swarmkit, manager/state/store/memory.go (findIterators).
    """
    name = file.spec.name.lower()
    is_named = not (filters["names"] or filters["name"] or filters["id"]) or (
        name in map(str.lower, filters["names"])
        or name.startswith(tuple(map(str.lower, filters["name"])))
        or file.id.startswith(filters["id"])
    )
    return is_named and has_labels(file.spec.labels, filters["label"])


async def _find_file(request: web.Request, kind: type[File]) -> File:
    return (await current_view(request)).resolve(kind, request.match_info["id"])


def _bounded(
    create: Callable[Concatenate[Transaction, P], File], request: web.Request, spec: SecretSpec | ConfigSpec
) -> Callable[Concatenate[Transaction, P], File]:
    is_admin = identity_of(request).is_admin
    return bounded(create, stack_of(spec.labels), is_admin=is_admin, measure=usage_of_others)


def _refuse_templating(request: web.Request, spec: SecretSpec | ConfigSpec, word: str) -> None:
    version = api_version(request)
    if spec.templating is not None and version < _TEMPLATING:
        raise InvalidArgument(f"{word} templating is not supported on the specified API version: {version}")


def _version(request: web.Request, word: str) -> int:
    try:
        return version_parameter(request, word)
    except InvalidArgument:
        raise InvalidArgument(f"invalid {word} version") from None
