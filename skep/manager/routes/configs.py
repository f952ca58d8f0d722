"""``/configs``.

Source: moby 20.10, daemon/cluster/configs.go; swarmkit, manager/controlapi/config.go.
"""

from aiohttp import web

from skep.api.server import ApiVersion, Filters, Routes, api_version, json_answer, json_list_answer, read_json
from skep.errors import InvalidArgument
from skep.manager.control import files as control
from skep.manager.routes.access import current_view, manager_of, version_parameter
from skep.manager.routes.shown import has_labels
from skep.model.secret import Config, ConfigSpec

routes = Routes()

_TEMPLATING = ApiVersion("1.37")


@routes.get("/configs")
async def list_configs(request: web.Request) -> web.StreamResponse:
    """All configs that fit the filters; of names and ids one has to fit."""
    filters = Filters.of(request)
    filters.refuse_unknown("name", "id", "label")
    view = await current_view(request)
    return json_list_answer([config for config in view.find(Config) if _fits(config, filters)])


def _fits(config: Config, filters: Filters) -> bool:
    is_named = not (filters["name"] or filters["id"]) or (
        config.spec.name.startswith(filters["name"] or ("\0",))
        or config.id.startswith(filters["id"] or ("\0",))
    )
    return is_named and has_labels(config.spec.labels, filters["label"])


@routes.post("/configs/create")
async def create_config(request: web.Request) -> web.StreamResponse:
    """Create a config."""
    manager = manager_of(request)
    spec = await read_json(request, ConfigSpec)
    version = api_version(request)
    if spec.templating is not None and version < _TEMPLATING:
        raise InvalidArgument(f"config templating is not supported on the specified API version: {version}")
    config = await manager.update(control.create_config, spec, new_id=manager.new_id, now=manager.now())
    return json_answer({"ID": config.id}, 201)


@routes.get("/configs/{id}")
async def inspect_config(request: web.Request) -> web.StreamResponse:
    """One config with its data."""
    view = await current_view(request)
    return json_answer(view.resolve(Config, request.match_info["id"]))


@routes.post("/configs/{id}/update")
async def update_config(request: web.Request) -> web.StreamResponse:
    """Change the labels of a config."""
    spec = await read_json(request, ConfigSpec)
    version = _version(request)
    config = (await current_view(request)).resolve(Config, request.match_info["id"])
    await manager_of(request).update(control.update_config, config.id, spec, version)
    return web.Response()


def _version(request: web.Request) -> int:
    try:
        return version_parameter(request, "config")
    except InvalidArgument:
        raise InvalidArgument("invalid config version") from None


@routes.delete("/configs/{id}")
async def remove_config(request: web.Request) -> web.StreamResponse:
    """Remove a config that no service uses."""
    config = (await current_view(request)).resolve(Config, request.match_info["id"])
    await manager_of(request).update(control.remove_config, config.id)
    return web.Response(status=204)
