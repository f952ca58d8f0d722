"""Operations on secrets, configs and networks, on a store in memory."""

import json

import pytest

from skep.aio.clock import SystemClock
from skep.api.formats.bodies import decode_body
from skep.api.formats.service_form import settled
from skep.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfSequence,
    SkepError,
)
from skep.manager.control.files import (
    create_config,
    create_secret,
    remove_config,
    remove_secret,
    update_config,
    update_secret,
)
from skep.manager.control.networks import create_network, first_networks, ingress_network, remove_network
from skep.manager.control.services import create_service, remove_service
from skep.model.container import ConfigReference, ContainerSpec, FileTarget, SecretReference
from skep.model.network import Network, NetworkSpec
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import NetworkAttachmentConfig, PortConfig, ServiceSpec, TaskSpec
from skep.model.values.ids import SecretId, new_id
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore
from tests.support.builders import a_service_spec

NOW = Timestamp("2026-01-02T03:04:05Z")


@pytest.fixture
def store():
    return MemoryStore(SystemClock())


async def a_secret(store, name: str = "s1", data: bytes = b"hidden") -> Secret:
    return await store.update(create_secret, SecretSpec(name=name), data, new_id=new_id, now=NOW)


async def a_network(store, name: str = "ov1") -> Network:
    spec = NetworkSpec(name=name, driver_configuration=Driver(name="overlay"))
    return await store.update(create_network, spec, new_id=new_id, now=NOW)


async def a_service(store, **template) -> str:
    files = {name: template.pop(name, ()) for name in ("secrets", "configs")}
    container = ContainerSpec(image="busybox", **files)
    spec = ServiceSpec(name="web", task_template=TaskSpec(container_spec=container, **template))
    service = await store.update(create_service, settled(spec), new_id=new_id, new_name=str, now=NOW)
    return service.id


async def a_config(store, data: bytes = b"shown") -> Config:
    return await store.update(create_config, ConfigSpec(name="c1", data=data), new_id=new_id, now=NOW)


def config_reference(config: Config) -> ConfigReference:
    return ConfigReference(config_id=config.id, config_name=config.spec.name, file=FileTarget(name="c"))


def reference(secret: Secret) -> SecretReference:
    return SecretReference(secret_id=secret.id, secret_name=secret.spec.name, file=FileTarget(name="s"))


async def test_the_data_of_a_secret_are_a_payload_of_their_own(store):
    secret = await a_secret(store)
    assert store.view().get(Payload, f"secret/{secret.id}").data == b"hidden"
    assert "hidden" not in repr(secret)


@pytest.mark.parametrize("size", [0, 500 * 1024])
async def test_a_secret_is_neither_empty_nor_large(store, size):
    with pytest.raises(InvalidArgument, match="less than 512000 bytes"):
        await a_secret(store, data=b"x" * size)


async def test_a_secret_whose_data_a_driver_has_is_refused(store):
    for spec, words in (
        (SecretSpec(name="s1", driver=Driver(name="vault")), 'plugin "vault" not found'),
        (SecretSpec(name="s1", driver=Driver()), "secret driver must have a name"),
    ):
        with pytest.raises(SkepError, match=f"^{words}$"):
            await store.update(create_secret, spec, b"", new_id=new_id, now=NOW)
    assert store.view().find(Secret) == []


async def test_a_secret_or_config_may_be_a_template(store):
    golang = Driver(name="golang")
    secret = SecretSpec(name="s1", templating=golang)
    await store.update(create_secret, secret, b"{{.Node.ID}}", new_id=new_id, now=NOW)
    config = ConfigSpec(name="c1", data=b"{{.Node.ID}}", templating=golang)
    await store.update(create_config, config, new_id=new_id, now=NOW)


@pytest.mark.parametrize("size", [0, 1000 * 1024])
async def test_a_config_is_neither_empty_nor_large(store, size):
    words = "config data must be larger than 0 and less than 1024000 bytes"
    with pytest.raises(InvalidArgument, match=f"^{words}$"):
        await a_config(store, data=b"x" * size)
    await a_config(store, data=b"x" * (1000 * 1024 - 1))


async def test_a_config_in_use_stays(store):
    config = await a_config(store)
    service = await a_service(store, configs=(config_reference(config),))
    with pytest.raises(InvalidArgument, match="config 'c1' is in use by the following service: web"):
        await store.update(remove_config, config.id)
    await store.update(remove_service, service, now=NOW)
    await store.update(remove_config, config.id)


async def test_a_secret_or_config_of_a_service_that_does_not_exist_is_refused(store):
    config, secret = await a_config(store), await a_secret(store)
    await store.update(remove_config, config.id)
    await store.update(remove_secret, secret.id)
    with pytest.raises(InvalidArgument, match="config not found: c1"):
        await a_service(store, configs=(config_reference(config),))
    with pytest.raises(InvalidArgument, match="secret not found: s1"):
        await a_service(store, secrets=(reference(secret),))


@pytest.mark.parametrize("kind", ["secret", "config"])
@pytest.mark.parametrize("mode", [-1, 2**32])
def test_a_mode_out_of_range_is_refused_as_gos_decoder_does(kind, mode):
    title = kind.title()
    file = {
        f"{title}ID": "x",
        f"{title}Name": "x",
        "File": {"Name": "x", "UID": "0", "GID": "0", "Mode": mode},
    }
    spec = {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "busybox", f"{title}s": [file]}}}
    with pytest.raises(
        InvalidArgument, match=f"cannot unmarshal number {mode} into Go .* of type fs.FileMode"
    ):
        decode_body(json.dumps(spec).encode(), ServiceSpec)


async def test_only_labels_of_a_secret_change(store):
    secret = await a_secret(store)
    version = secret.version.index
    spec = SecretSpec(name="s1", labels={"a": "b"})
    changed = await store.update(update_secret, secret.id, spec, b"hidden", version)
    assert changed.spec.labels == {"a": "b"}
    with pytest.raises(OutOfSequence):
        await store.update(update_secret, secret.id, spec, None, version)
    with pytest.raises(InvalidArgument, match="only updates to Labels"):
        await store.update(update_secret, secret.id, spec, b"other", changed.version.index)
    with pytest.raises(InvalidArgument, match="only updates to Labels"):
        await store.update(update_secret, secret.id, SecretSpec(name="s2"), None, changed.version.index)


async def test_a_secret_in_use_stays(store):
    secret = await a_secret(store)
    service = await a_service(store, secrets=(reference(secret),))
    with pytest.raises(InvalidArgument, match="secret 's1' is in use by the following service: web"):
        await store.update(remove_secret, secret.id)
    await store.update(remove_service, service, now=NOW)
    await store.update(remove_secret, secret.id)
    assert store.view().find(Payload) == []


async def test_a_secret_has_to_have_the_name_a_service_gives_it(store):
    secret = await a_secret(store)
    strange = SecretReference(secret_id=secret.id, secret_name="other", file=FileTarget(name="s"))
    with pytest.raises(InvalidArgument, match="secret not found: other"):
        await a_service(store, secrets=(strange,))


async def test_a_removed_secret_is_gone(store):
    with pytest.raises(NotFound):
        await store.update(remove_secret, SecretId("nosuch"))


async def test_configs_are_created_labeled_and_removed(store):
    config = await store.update(create_config, ConfigSpec(name="c1", data=b"x"), new_id=new_id, now=NOW)
    with pytest.raises(AlreadyExists, match="config c1 already exists"):
        await store.update(create_config, ConfigSpec(name="c1", data=b"x"), new_id=new_id, now=NOW)
    spec = ConfigSpec(name="c1", labels={"a": "b"})
    changed = await store.update(update_config, config.id, spec, config.version.index)
    assert (changed.spec.labels, changed.spec.data) == ({"a": "b"}, b"x")
    await store.update(remove_config, config.id)


async def test_a_network_in_use_stays_until_its_service_is_removed(store):
    network = await a_network(store)
    service = await a_service(store, networks=(NetworkAttachmentConfig(target=network.id),))
    with pytest.raises(FailedPrecondition, match=f"network {network.id} is in use by service {service}"):
        await store.update(remove_network, network.id)
    await store.update(remove_service, service, now=NOW)
    await store.update(remove_network, network.id)


async def test_there_is_one_ingress_network_and_it_stays_while_ports_are_published(store):
    def begin(tx):
        for network in first_networks(new_id=new_id, now=NOW):
            tx.put(network)

    await store.update(begin)
    ingress = ingress_network(store.view())
    another = NetworkSpec(name="i2", ingress=True, driver_configuration=Driver(name="overlay"))
    with pytest.raises(AlreadyExists, match="is already present"):
        await store.update(create_network, another, new_id=new_id, now=NOW)
    spec = settled(a_service_spec(ports=(PortConfig(target_port=80),)))
    await store.update(create_service, spec, new_id=new_id, new_name=str, now=NOW)
    with pytest.raises(FailedPrecondition, match="ingress network cannot be removed because service"):
        await store.update(remove_network, ingress.id)


async def test_predefined_networks_stay(store):
    (_, bridge, _) = first_networks(new_id=new_id, now=NOW)
    await store.update(lambda tx: tx.put(bridge))
    with pytest.raises(FailedPrecondition, match="is a swarm predefined network"):
        await store.update(remove_network, bridge.id)
