"""Stacks, which only Skep has: ``POST /skep/stacks/check`` and ``/skep/stacks/{name}/quota``.

The check returns the refusals of a whole deploy, and writes nothing.  A quota limits a stack's services together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import TimeSlices
from skep.api.access.identity import identity_of
from skep.api.access.permissions import shown_error
from skep.api.formats.networks import NetworkBody, check_form, check_name
from skep.api.formats.service_form import UNRECOGNIZED, settled
from skep.api.http.server import Routes, json_list_response, json_response, read_json
from skep.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    OutOfSequence,
    ResourceExhausted,
    SkepError,
)
from skep.manager.control import files as file_control
from skep.manager.control import networks, services
from skep.manager.control import quotas as control
from skep.manager.control.validation.new_objects import visible_to
from skep.manager.routes.access import ManagerApi, current_view, manager_of
from skep.manager.routes.networks import spec_of_body
from skep.manager.routes.services import ServiceChange
from skep.manager.services.quotas import quota_of
from skep.model.network import Network
from skep.model.options.labels import STACK_REVISION
from skep.model.permissions.access import Identity
from skep.model.quota import QuotaSpec
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service, ServiceSpec
from skep.model.values.encoding import ApiObject, always, to_json
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import stack_of
from skep.store.interface import Transaction

routes = Routes()

_OBJECTS_MAX = 2_000
"""Largest number of objects in one plan."""
_DATA_BYTES_MAX = 64 << 20
"""Largest size of all secrets and configs together in bytes.  Zeros of the same size replace their content during the
check.
"""
STACK = "stack"
"""Kind of a refusal of all objects together."""
_ATTEMPTS = 3
"""Largest number of attempts to check a plan while the cluster changes."""


class SizedSecret(SecretSpec):
    """A secret to create, without its content."""

    data_bytes: int = 0

    @property
    def spec(self) -> SecretSpec:
        """Return the spec."""
        return SecretSpec(name=self.name, labels=self.labels, driver=self.driver, templating=self.templating)


class SizedConfig(ConfigSpec):
    """A config to create, without its content."""

    data_bytes: int = 0

    @property
    def spec(self) -> ConfigSpec:
        """Return the spec, with zeros as content."""
        return ConfigSpec(
            name=self.name, labels=self.labels, templating=self.templating, data=bytes(self.data_bytes)
        )


class StackCheck(ApiObject):
    """The objects of a deploy."""

    networks: tuple[NetworkBody, ...] = ()
    secrets: tuple[SizedSecret, ...] = ()
    configs: tuple[SizedConfig, ...] = ()
    removed: tuple[ServiceId, ...] = ()
    """Services that are removed before the others are changed."""
    services: tuple[ServiceChange, ...] = ()

    @property
    def bodies(self) -> tuple[Any, ...]:
        """The objects for which permissions are checked."""
        return (*self.networks, *self.secrets, *self.configs, *(one.spec for one in self.services))

    @property
    def creates(self) -> bool:
        """Whether an object is created."""
        return bool(self.networks or self.secrets or self.configs or any(not one.id for one in self.services))


class StackRefusal(ApiObject):
    """An object that would be refused.  ``kind`` is network, secret, config or service, or stack for all together."""

    kind: str = always("")
    name: str = always("")
    error: str = always("")


@routes.post("/skep/stacks/check")
async def check_stack(request: web.Request) -> web.StreamResponse:
    """Try to create and change these objects, each after those before it, and return the refused ones."""
    manager, identity = manager_of(request), identity_of(request)
    refusals: list[StackRefusal] = []
    # The body is read before the slot is taken, because a client may send it slowly.
    wanted = await read_check(request)
    async with manager.checks.hold():
        await current_view(request)
        for _ in range(_ATTEMPTS):
            revision = manager.store.view().revision
            refusals = await _refusals(wanted, manager, identity)
            if not refusals or manager.store.view().revision == revision:
                break
    if not refusals and wanted.bodies:
        try:
            await manager.require_room(creates=wanted.creates, adds=_added_bytes(wanted))
        except ResourceExhausted as error:
            first = wanted.bodies[0]
            refusals = [StackRefusal(kind=STACK, name=stack_of(first.labels), error=str(error))]
    return json_list_response(refusals)


def _added_bytes(wanted: StackCheck) -> int:
    """Return about how many bytes the deploy adds to the store, with the revision that records its services."""
    files: tuple[SizedSecret | SizedConfig, ...] = (*wanted.secrets, *wanted.configs)
    data = sum(one.data_bytes for one in files)
    return data * 4 // 3 + sum(len(to_json(one)) for one in wanted.bodies) * 2  # content is stored as base64


async def _refusals(wanted: StackCheck, manager: ManagerApi, identity: Identity) -> list[StackRefusal]:
    tx, made, slices = manager.store.rehearsal(), [], TimeSlices(SystemClock())
    for kind, name, stack, attempt in _attempts(wanted, manager, identity):
        await slices.yield_if_due()
        try:
            attempt(tx)
        except OutOfSequence:  # The service has changed in the meantime. The deploy will merge both changes.
            continue
        except SkepError as error:
            is_taken = isinstance(error, AlreadyExists)
            if is_taken and any(
                stack_of(one.spec.labels) == stack for one in tx.find(_KINDS[kind], name=name)
            ):
                continue  # a deploy of the same stack has just created it: this deploy uses or updates it
            shown = shown_error(identity, error)
            made.append(StackRefusal(kind=kind, name=name, error=str(shown) or type(shown).__name__))
    return made


async def read_check(request: web.Request) -> StackCheck:
    """Read the body of ``request``.  Raises: InvalidArgument."""
    wanted = await read_json(request, StackCheck, unrecognized=UNRECOGNIZED)
    if len(wanted.bodies) + len(wanted.removed) > _OBJECTS_MAX:
        raise InvalidArgument(f"too much at once: at most {_OBJECTS_MAX} objects")
    if sum(STACK_REVISION in one.labels for one in wanted.configs) > 1:
        # Each revision marks earlier ones as replaced.
        raise InvalidArgument("a deploy can have only one stack revision")
    files: tuple[SizedSecret | SizedConfig, ...] = (*wanted.secrets, *wanted.configs)
    sizes = [one.data_bytes for one in files]
    if any(size < 0 for size in sizes) or sum(sizes) > _DATA_BYTES_MAX:
        raise InvalidArgument(f"too much at once: at most {_DATA_BYTES_MAX >> 20} MiB of secrets and configs")
    return wanted


_KINDS: Mapping[str, type[Any]] = {
    "network": Network,
    "secret": Secret,
    "config": Config,
    "service": Service,
}
Attempt = tuple[str, str, str, Callable[[Transaction], object]]
"""Kind, name and stack of an object, and the attempted change."""


def _attempts(wanted: StackCheck, manager: ManagerApi, identity: Identity) -> Iterator[Attempt]:
    new_id, now, by_admin = manager.new_id, manager.now(), identity.is_admin

    def network(tx: Transaction, one: NetworkBody) -> None:
        check_name(one.name)
        check_form(one)
        networks.create_network(tx, spec_of_body(one), new_id=new_id, now=now)

    def secret(tx: Transaction, one: SizedSecret) -> None:
        file_control.create_secret(tx, one.spec, bytes(one.data_bytes), new_id=new_id, now=now)

    def config(tx: Transaction, one: SizedConfig) -> None:
        file_control.create_config(tx, one.spec, new_id=new_id, now=now)

    def service(tx: Transaction, one: ServiceChange) -> None:
        among = visible_to(tx, identity)
        spec = with_file_ids(tx, settled(services.with_network_ids(tx, one.spec, among)))
        if one.id:
            services.update_service(tx, one.id, spec, one.version, now=now, by_admin=by_admin)
        else:
            services.create_service(
                tx, spec, new_id=new_id, new_name=manager.new_name, now=now, by_admin=by_admin
            )

    yield from _of("network", wanted.networks, network)
    yield from _of("secret", wanted.secrets, secret)
    yield from _of("config", wanted.configs, config)
    for removed in wanted.removed:
        yield "service", removed, "", partial(services.remove_service, id=removed, now=now)
    for change in wanted.services:
        name, stack = change.spec.name, stack_of(change.spec.labels)
        yield "service", name, stack, partial(service, one=change)


def _of(kind: str, objects: Iterable[Any], attempt: Callable[..., object]) -> Iterator[Attempt]:
    for one in objects:
        yield kind, one.name, stack_of(one.labels), partial(attempt, one=one)


def with_file_ids(tx: Transaction, spec: ServiceSpec) -> ServiceSpec:
    """Return ``spec`` with the ids of the secrets and configs that it names."""
    container = spec.task_template.container_spec
    if container is None:
        return spec
    container = replace(
        container,
        secrets=tuple(
            replace(one, secret_id=next((each.id for each in tx.find(Secret, name=one.secret_name)), ""))
            for one in container.secrets
        ),
        configs=tuple(
            replace(one, config_id=next((each.id for each in tx.find(Config, name=one.config_name)), ""))
            for one in container.configs
        ),
    )
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


@routes.get("/skep/stacks/{name}/quota")
async def show_quota(request: web.Request) -> web.StreamResponse:
    """Show the quota of a stack and its usage."""
    view, name = await current_view(request), request.match_info["name"]
    quota = quota_of(view, name)
    if quota is None:
        raise NotFound(f"stack {name} has no quota")
    return json_response(control.quota_state(view, quota))


@routes.put("/skep/stacks/{name}/quota")
async def set_quota(request: web.Request) -> web.StreamResponse:
    """Set the quota of a stack."""
    manager = manager_of(request)
    spec = replace(await read_json(request, QuotaSpec), name=request.match_info["name"])
    await manager.require_room(creates=True)
    quota = await manager.update(control.set_quota, spec, new_id=manager.new_id, now=manager.now())
    return json_response(control.quota_state(manager.store.view(), quota))


@routes.delete("/skep/stacks/{name}/quota")
async def remove_quota(request: web.Request) -> web.StreamResponse:
    """Remove the quota of a stack."""
    await manager_of(request).update(control.remove_quota, request.match_info["name"])
    return web.Response(status=204)
