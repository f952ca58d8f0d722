"""Helpers that the store's contract tests share."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from skep.errors import (
    SkepError,
)
from skep.model.container import ConfigReference, ContainerSpec, SecretReference
from skep.model.network import Network, NetworkSpec
from skep.model.secret import Secret, SecretSpec
from skep.model.service import (
    EndpointSpec,
    NetworkAttachmentConfig,
    PortConfig,
    PublishMode,
    Service,
    ServiceSpec,
    TaskSpec,
)
from skep.model.values.ids import ConfigId, NetworkId, SecretId, ServiceId
from skep.store.interface import (
    Transaction,
)
from skep.store.level import LEVEL

T = TypeVar("T", bound=msgspec.Struct)


def put(tx: Transaction, object: T) -> T:
    return tx.put(object)


def delete(tx: Transaction, kind: type[Any], id: str) -> None:
    tx.delete(kind, id)


def raise_level(tx: Transaction, level: int = LEVEL) -> None:
    """Raise the level, as a new cluster has the newest one."""
    tx.raise_level(level)


def change(tx: Transaction, kind: type[T], id: str, **fields: Any) -> T:
    return tx.put(replace(tx.get(kind, id), **fields))


async def eventually(holds: Callable[[], object]) -> None:
    """Return when ``holds()`` is true.  The test's own deadline limits the wait."""
    while not holds():  # noqa: ASYNC110 - a replica announces no single revision to outsiders
        await asyncio.sleep(0.005)


async def outcome(doing: Awaitable[T]) -> T | SkepError:
    try:
        return await doing
    except SkepError as error:
        return error


def using(
    name: str,
    *,
    secrets: tuple[str, ...] = (),
    configs: tuple[str, ...] = (),
    networks: tuple[str, ...] = (),
    ports: tuple[PortConfig, ...] = (),
) -> Service:
    """Return a service that refers to objects by id."""
    container = ContainerSpec(
        image="busybox",
        secrets=tuple(SecretReference(secret_id=SecretId(id)) for id in secrets),
        configs=tuple(ConfigReference(config_id=ConfigId(id)) for id in configs),
    )
    attachments = tuple(NetworkAttachmentConfig(target=id) for id in networks)
    return Service(
        id=ServiceId(name),
        spec=ServiceSpec(
            name=name,
            task_template=TaskSpec(container_spec=container, networks=attachments),
            endpoint_spec=EndpointSpec(ports=ports) if ports else None,
        ),
    )


def a_secret(name: str) -> Secret:
    return Secret(id=SecretId(name), spec=SecretSpec(name=name))


def a_network(name: str) -> Network:
    return Network(id=NetworkId(name), spec=NetworkSpec(name=name))


def port(number: int, mode: PublishMode = PublishMode.INGRESS, protocol: str = "tcp") -> PortConfig:
    return PortConfig(published_port=number, target_port=80, protocol=protocol, publish_mode=mode)
