"""Who wrote a log driver or an image decides what nodes do for it with their own rights."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.manager.control.services import create_service, rollback_service, update_service
from skep.manager.control.validation.new_objects import machine_rights
from skep.manager.nodes.trust import repository_of, trust_of
from skep.model.measures.queries import queries_in
from skep.model.options.autoscaling import autoscaling_of
from skep.model.options.labels import ALLOW_CREDENTIAL_HELPERS, ALLOW_MACHINE_LOGS, check_swarm_labels
from skep.model.permissions.user import User, UserSpec
from skep.model.service import Service, ServiceSpec
from skep.model.staging.updates import CANARY, UPDATE, query_bounds_of
from skep.model.swarm import Swarm, SwarmSpec
from skep.model.task import Trust
from skep.model.values.ids import ClusterId, UserId, new_id
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_service_spec, a_task

NOW = Timestamp("2026-01-02T03:04:05Z")
LATER = Timestamp("2999-01-01T00:00:00Z")
LOCAL = Driver(name="syslog", options={"syslog-address": "udp://logs.corp.example:514"})
OTHER = Driver(name="gelf", options={"gelf-address": "udp://10.0.0.9:12201"})
IMAGE = "registry.corp.example/shop/web:1"


def a_spec(log: Driver | None = LOCAL, image: str = IMAGE, **fields: Any) -> ServiceSpec:
    spec = a_service_spec("shop_web", image=image, **fields)
    labels = {"com.docker.stack.namespace": "shop"}
    return replace(spec, labels=labels, task_template=replace(spec.task_template, log_driver=log))


class Cluster:
    """A store with an operator, unless a test wants none."""

    def __init__(self, *roles: str, **labels: str) -> None:
        self.store = MemoryStore(SystemClock())
        self._objects = [Swarm(id=ClusterId("c"), spec=SwarmSpec(labels=labels))]
        self._objects += [User(id=UserId(role), spec=UserSpec(name=role, roles=(role,))) for role in roles]

    async def create(self, spec: ServiceSpec, *, by_admin: bool) -> Service:
        await self.store.update(lambda tx: [tx.put(one) for one in self._objects])
        return await self.store.update(
            create_service, settled(spec), new_id=new_id, new_name=str, now=NOW, by_admin=by_admin
        )

    async def update(self, service: Service, spec: ServiceSpec, *, by_admin: bool) -> Service:
        index = service.version.index
        return await self.store.update(
            update_service, service.id, settled(spec), index, now=NOW, by_admin=by_admin
        )

    async def rollback(self, service: Service) -> Service:
        index = service.version.index
        return await self.store.update(rollback_service, service.id, service.spec, index, now=NOW)

    def trust(self, service: Service, spec: ServiceSpec | None = None) -> Trust:
        task = replace(a_task(), spec=(spec or service.spec).task_template)
        return trust_of(self.store.view(), service, task)


@pytest.mark.parametrize("by_admin", [True, False])
async def test_what_an_administrator_wrote_is_trusted(by_admin):
    cluster = Cluster("operator:shop")
    service = await cluster.create(a_spec(), by_admin=by_admin)
    assert cluster.trust(service) == Trust(logs=by_admin, logins=by_admin)


async def test_a_nodes_default_log_is_trusted_and_options_for_it_are_not():
    cluster = Cluster("operator:shop")
    for log in (None, Driver()):
        assert cluster.trust(await cluster.create(a_spec(log), by_admin=False)).logs
        cluster = Cluster("operator:shop")
    service = await cluster.create(a_spec(Driver(options=LOCAL.options)), by_admin=False)
    assert not cluster.trust(service).logs


async def test_an_operators_other_change_keeps_the_trust_and_their_own_values_have_none():
    cluster = Cluster("operator:shop")
    service = await cluster.create(a_spec(), by_admin=True)
    service = await cluster.update(service, a_spec(image="registry.corp.example/shop/web:2"), by_admin=False)
    assert cluster.trust(service) == Trust(logs=True, logins=True)
    service = await cluster.update(
        service, a_spec(OTHER, "registry.corp.example/payments/api"), by_admin=False
    )
    assert cluster.trust(service) == Trust()
    service = await cluster.rollback(service)
    assert cluster.trust(service) == Trust(logs=True, logins=True)


async def test_an_update_that_replaces_a_canary_keeps_the_trust_of_the_spec_before_it():
    """Its old tasks still run, and a rollback leads to them."""
    cluster = Cluster("operator:shop")

    def canary(spec: ServiceSpec) -> ServiceSpec:
        return replace(spec, labels={**spec.labels, UPDATE: CANARY})

    first = await cluster.create(canary(a_spec()), by_admin=True)
    service = first
    for tag in ("2", "3"):
        spec = canary(a_spec(OTHER, f"registry.corp.example/payments/api:{tag}"))
        service = await cluster.update(service, spec, by_admin=False)
        assert cluster.trust(service) == Trust()
        assert cluster.trust(service, first.spec) == Trust(logs=True, logins=True)
    assert cluster.trust(await cluster.rollback(service)) == Trust(logs=True, logins=True)


async def test_an_administrator_who_changes_something_else_does_not_bless_an_operators_values():
    cluster = Cluster("operator:shop")
    service = await cluster.create(a_spec(), by_admin=False)
    service = await cluster.update(service, a_spec(replicas=7), by_admin=True)
    assert cluster.trust(service) == Trust()
    service = await cluster.update(service, a_spec(OTHER, replicas=7), by_admin=True)
    assert cluster.trust(service) == Trust(logs=True)


async def test_a_task_of_an_older_spec_has_the_trust_of_its_own_values():
    cluster = Cluster("operator:shop")
    old = await cluster.create(a_spec(OTHER), by_admin=False)
    service = await cluster.update(old, a_spec(), by_admin=True)
    assert cluster.trust(service).logs
    assert not cluster.trust(service, old.spec).logs


@pytest.mark.parametrize(
    ("roles", "trusted"),
    [((), True), (("admin",), True), (("viewer", "admin"), True), (("operator:shop", "admin"), False)],
)
async def test_a_service_of_an_older_version_is_an_administrators_if_nobody_else_writes(roles, trusted):
    cluster = Cluster(*roles)
    service = replace(await cluster.create(a_spec(), by_admin=False), trusted=None)
    assert cluster.trust(service) == Trust(logs=trusted, logins=trusted)


async def test_an_operator_who_comes_later_takes_no_trust_from_a_service_of_an_older_version():
    cluster = Cluster("operator:shop")
    service = await cluster.create(a_spec(), by_admin=False)
    for written, trusted in ((Timestamp("2025-01-01T00:00:00Z"), True), (LATER, False)):
        older = replace(service, trusted=None, updated_at=written)
        assert cluster.trust(older) == Trust(logs=trusted, logins=trusted)


async def test_the_first_administrator_who_writes_a_service_of_an_older_version_answers_for_it():
    cluster = Cluster("operator:shop")
    service = await cluster.create(a_spec(), by_admin=False)
    await cluster.store.update(lambda tx: tx.put(replace(service, trusted=None)))
    (older,) = cluster.store.view().find(Service)
    assert cluster.trust(older) == Trust()
    assert cluster.trust(await cluster.update(older, a_spec(), by_admin=True)) == Trust(
        logs=True, logins=True
    )


@pytest.mark.parametrize(
    ("label", "logins"),
    [
        ("shop=registry.corp.example/shop", True),
        ("shop=registry.corp.example/shop/web", True),
        ("*=registry.corp.example", True),
        ("eu=registry.corp.example/shop,shop=other.example", False),
        ("shop=registry.corp.example/sho", False),
        ("shop=registry.corp.example/shop/web/deep", False),
        ("nonsense", False),
    ],
)
async def test_repositories_of_helpers_are_allowed_for_a_stack(label, logins):
    cluster = Cluster("operator:shop", **{ALLOW_CREDENTIAL_HELPERS: label})
    assert cluster.trust(await cluster.create(a_spec(), by_admin=False)) == Trust(logins=logins)


async def test_logs_to_machines_are_allowed_by_the_cluster():
    cluster = Cluster("operator:shop", **{ALLOW_MACHINE_LOGS: "true"})
    service = await cluster.create(a_spec(), by_admin=False)
    assert cluster.trust(service).logs
    assert machine_rights(cluster.store.view(), a_spec(Driver(name="journald"))) == ""


@pytest.mark.parametrize("label", ["shop", "shop=", "=x", "shop=a b", "shop=/"])
def test_an_invalid_list_of_repositories_is_refused(label):
    with pytest.raises(Exception, match="expected STACK=REGISTRY/REPOSITORY"):
        check_swarm_labels({ALLOW_CREDENTIAL_HELPERS: label})


@pytest.mark.parametrize(
    "log",
    [
        Driver(name="journald"),
        Driver(name="syslog"),
        Driver(name="syslog", options={"syslog-address": "tcp://127.0.0.1:6379"}),
        Driver(name="syslog", options={"syslog-address": "tcp://[::1]:6379"}),
        Driver(name="syslog", options={"syslog-address": "udp://[::ffff:127.0.0.1]:514"}),
        Driver(name="syslog", options={"syslog-address": "udp://:514"}),
        Driver(name="fluentd"),
        Driver(name="fluentd", options={"fluentd-address": "localhost"}),
        Driver(name="fluentd", options={"fluentd-address": "127.9.9.9:24224"}),
        Driver(name="gelf", options={"gelf-address": "udp://169.254.169.254:80"}),
        Driver(name="gelf", options={"gelf-address": "udp://0.0.0.0:80"}),
        Driver(name="splunk", options={"splunk-url": "https://a:b@localhost:8088/"}),
        Driver(name="splunk", options={"splunk-url": "https://x.LOCALHOST.:8088"}),
        Driver(options={"syslog-address": "tcp://127.0.0.1:6379"}),
    ],
    ids=str,
)
def test_logs_of_the_machine_are_an_administrators(log):
    assert machine_rights(MemoryStore(SystemClock()).view(), a_spec(log))


@pytest.mark.parametrize("log", [None, Driver(), Driver(name="json-file"), LOCAL, OTHER], ids=str)
def test_other_logs_are_anyones(log):
    assert machine_rights(MemoryStore(SystemClock()).view(), a_spec(log)) == ""


@pytest.mark.parametrize(
    ("image", "repository"),
    [
        ("web", "docker.io/library/web"),
        ("docker.io/web:1", "docker.io/library/web"),
        ("index.docker.io/team/web@sha256:1", "docker.io/team/web"),
        ("r.example:5000/a/b:1@sha256:2", "r.example:5000/a/b"),
        ("localhost/x", "localhost/x"),
    ],
)
def test_a_repository_is_an_image_without_its_tag(image, repository):
    assert repository_of(image) == repository


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([None, LOCAL, OTHER])), min_size=1, max_size=8))
async def test_only_values_that_an_administrator_wrote_are_ever_trusted(writes):
    """Whatever order administrators and operators write in."""
    cluster = Cluster("operator:shop")
    service, written, before = None, [], None
    for number, (by_admin, log) in enumerate(writes):
        spec = a_spec(log, replicas=number)
        written += [log] if by_admin and log != before else []  # what stays as it is was another's
        if service is None:
            service = await cluster.create(spec, by_admin=by_admin)
        else:
            service = await cluster.update(service, spec, by_admin=by_admin)
        trusts = cluster.trust(service).logs
        assert not trusts or log is None or log in written
        assert trusts or not (by_admin and log != before)
        before = log


OWN_URL, OPERATORS_URL = "http://127.0.0.1:9090", "http://prometheus.shop.example"


def queried(url: str, label: str = "skep.autoscale.prometheus") -> ServiceSpec:
    spec = a_spec()
    if label == "skep.update.prometheus":
        labels = {"skep.update": "canary", "skep.update.query": "x", "skep.update.query-max": "1"}
    elif label == "skep.autoscale.queue":
        labels = {"skep.autoscale": "1..2", "skep.autoscale.queue-target": "1"}
    else:
        labels = {"skep.autoscale": "1..2", "skep.autoscale.query": "x", "skep.autoscale.query-target": "1"}
    return replace(spec, labels={**spec.labels, **labels, label: url})


async def test_queries_are_trusted_by_value_as_log_drivers_are():
    cluster = Cluster("operator:shop")
    service = await cluster.create(queried(OWN_URL), by_admin=True)
    assert urls(service) == (OWN_URL,)
    service = await cluster.update(service, replace(queried(OWN_URL), name="shop_web"), by_admin=False)
    assert urls(service) == (OWN_URL,), "an operator changes something else"
    assert machine_rights(cluster.store.view(), queried(OWN_URL), service) == ""
    service = await cluster.update(service, queried(OPERATORS_URL), by_admin=False)
    assert urls(service) == (OWN_URL,), "the previous spec has it"
    service = await cluster.update(service, queried(OPERATORS_URL), by_admin=True)
    assert urls(service) == (), "an administrator changes something else"
    service = await cluster.update(service, queried("http://10.0.0.1"), by_admin=True)
    assert urls(service) == ("http://10.0.0.1",)


@pytest.mark.parametrize(
    ("label", "changed"),
    [
        ("skep.autoscale.prometheus", "skep.autoscale.query"),
        ("skep.autoscale.queue", "skep.autoscale.queue-field"),
        ("skep.update.prometheus", "skep.update.query"),
    ],
)
async def test_an_operators_other_figure_of_a_trusted_url_is_not_trusted(label, changed):
    cluster = Cluster("operator:shop")
    admins = queried(OWN_URL, label)
    service = await cluster.create(admins, by_admin=True)
    other = replace(admins, labels={**admins.labels, changed: "orders_of_another_stack"})
    found = machine_rights(cluster.store.view(), other, service)
    assert found == f"an address of its manager's machine ({OWN_URL})"
    targets = {name: "7" for name in admins.labels if name.endswith(("-target", "-max"))}
    assert targets
    view, retargeted = cluster.store.view(), replace(admins, labels={**admins.labels, **targets})
    assert machine_rights(view, retargeted, service) == "", "the same figure"
    service = await cluster.update(service, other, by_admin=False)
    assert queries_in(other.labels)[0] not in service.trusted.queries
    service = await cluster.update(service, other, by_admin=True)
    service = await cluster.update(service, retargeted, by_admin=False)
    assert urls(service) == (), "nobody but the operator wrote it"


@pytest.mark.parametrize("url", ["http://[", "http://[::1", "http://a]b", "http://127.0.0.1:x"])
async def test_rights_of_an_invalid_url_are_no_error(url):
    machine_rights(Cluster("operator:shop").store.view(), queried(url))


async def test_commands_of_queries_are_trusted_by_value():
    """Only a trusted one runs in a container with rights over its machine."""
    cluster, spec = Cluster("operator:shop"), a_spec()
    labels = {
        "skep.autoscale": "1..2",
        "skep.autoscale.queue-target": "1",
        "skep.autoscale.queue.exec-in": "db",
    }
    admins = replace(spec, labels={**spec.labels, **labels, "skep.autoscale.queue.exec": "llen jobs"})
    operators = replace(spec, labels={**admins.labels, "skep.autoscale.queue.exec": "sh -c 'mount /dev/sda'"})
    service = await cluster.create(admins, by_admin=True)
    assert machine_rights(cluster.store.view(), operators) == "", (
        "it is refused where the container has rights"
    )
    asked = autoscaling_of(admins.labels).queries.values()
    assert [one.query for one in asked] == list(service.trusted.queries)
    service = await cluster.update(service, operators, by_admin=False)
    (written,) = autoscaling_of(operators.labels).queries.values()
    assert written.query not in service.trusted.queries
    elsewhere = replace(admins, labels={**admins.labels, "skep.autoscale.queue.exec-in": "agent"})
    service = await cluster.update(service, elsewhere, by_admin=False)
    assert service.trusted.queries == (), "the same command in another service"


async def test_an_invalid_command_is_no_trusted_query():
    assert queries_in({"skep.autoscale.queue.exec": "'"}) == []


async def test_the_queries_that_loops_ask_are_those_that_are_trusted():
    for label in ("skep.autoscale.prometheus", "skep.autoscale.queue", "skep.update.prometheus"):
        labels = queried(OWN_URL, label).labels
        scaling, bounds = autoscaling_of(labels), query_bounds_of(labels)
        asked = [one.query for one in scaling.queries.values()] if scaling is not None else [bounds.query]
        assert asked == queries_in(labels)


@pytest.mark.parametrize(
    "label", ["skep.autoscale.prometheus", "skep.autoscale.queue", "skep.update.prometheus"]
)
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9090",
        "http://LocalHost.",
        "http://127.1/x",
        "http://[::1]",
        "http://169.254.169.254",
    ],
)
async def test_addresses_of_the_machine_are_refused_to_users_below_administrator(label, url):
    cluster = Cluster("operator:shop")
    spec = queried(url, label)
    found = machine_rights(cluster.store.view(), spec)
    assert found == f"an address of its manager's machine ({url})"
    assert machine_rights(cluster.store.view(), queried(OPERATORS_URL, label)) == ""


def urls(service: Service) -> tuple[str, ...]:
    assert service.trusted is not None
    return tuple(query.url for query in service.trusted.queries)
