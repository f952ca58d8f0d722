"""Programs that know Consul, DNS or etcd read the catalog of a manager: etcdctl, and the calls of other programs."""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import dnslib
import pytest
from aiohttp import ClientSession
from click.testing import CliRunner
from msgspec.structs import replace

from skep.catalog.consul import ConsulView, serving_consul
from skep.catalog.etcd import EtcdView, serving_keys
from skep.catalog.etcd_keys import KEPT_MAX, values_of
from skep.catalog.following import KnownCatalog
from skep.catalog.names import DnsView, serving_names, weighted_shuffle
from skep.cli.main import main
from skep.manager.catalog.registrations import register
from skep.model.catalog import CatalogInstance, CatalogService, ServiceCatalog, ServiceRegistration
from tests.component.test_balancing import served
from tests.conformance.manager import a_manager_api
from tests.conftest import SEARCHED
from tests.support.machines.playground_rig import SKEP
from tests.support.store.store_transactions import eventually, raise_level

pytestmark = [pytest.mark.needs("etcdctl"), pytest.mark.timeout(60)]
TAGS = ("traefik.enable=true", "traefik.http.routers.web.rule=Host(`a.example`)")


def an_instance(id: str, address: str, port: int = 8080, tags: tuple[str, ...] = TAGS) -> CatalogInstance:
    return CatalogInstance(id=id, node="n1", node_address="10.0.0.1", address=address, port=port, tags=tags)


def a_catalog(*instances: CatalogInstance, **more: CatalogService) -> ServiceCatalog:
    web = CatalogService(name="web", stack="shop", tags=TAGS, instances=instances)
    services = {"web": web, **more}
    return ServiceCatalog(
        services=tuple(services[name] for name in sorted(services)), nodes={"n1": "10.0.0.1"}
    )


REGISTRATION = ServiceRegistration(service="db", instance="db1", address="192.0.2.7", port=5432)
ONE, TWO = an_instance("t1", "10.0.0.1"), an_instance("t2", "10.0.0.2", tags=())


@pytest.fixture
def known() -> KnownCatalog:
    made = KnownCatalog(first_index=100)
    made.replace("a", a_catalog(ONE, TWO))
    return made


async def test_one_impossible_instance_or_node_is_left_out_of_every_view(known: KnownCatalog) -> None:
    bad = (an_instance("t3", "10.0.0.3", 99_999), an_instance("t4", "nowhere"), an_instance("t5", ""))
    found = a_catalog(ONE, *bad)
    known.replace("b", replace(found, nodes={**found.nodes, "n2": "", "n3": "nowhere"}))
    assert [one.id for one in known.services["web"].instances] == ["t1"]
    async with serving_names(DnsView(known, list.reverse), "127.0.0.1", 0) as port:
        resolver = Resolver(port)
        assert await resolver.answers("web.service.consul", "SRV") == ["1 1 8080 0a000001.addr.dc1.consul."]
        assert (await resolver.ask("n2.node.consul")).header.rcode == dnslib.RCODE.NXDOMAIN


# -- Consul ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def consul(known: KnownCatalog, view: ConsulView | None = None) -> AsyncIterator[Callable[..., Any]]:
    async with serving_consul(view or ConsulView(known), "127.0.0.1", 0) as port, ClientSession() as session:

        async def get(path: str, method: str = "GET", **headers: str) -> tuple[int, Any, int]:
            url = f"http://127.0.0.1:{port}{path}"
            async with session.request(method, url, headers=headers) as response:
                body = await response.read()
                is_json = response.content_type == "application/json"
                value = json.loads(body) if is_json else body.decode()
                return response.status, value, int(response.headers.get("X-Consul-Index", 0))

        yield get


async def test_traefiks_provider_finds_addresses_ports_tags_and_states(known: KnownCatalog) -> None:
    """The calls of Traefik 2.11, pkg/provider/consulcatalog: services, then each in the catalog and in health."""
    async with consul(known) as get:
        status, services, index = await get("/v1/catalog/services?stale=")
        assert (status, services, index) == (200, {"web": list(TAGS)}, 101)
        _, entries, _ = await get("/v1/catalog/service/web?stale=")
        _, healths, _ = await get("/v1/health/service/web?stale=")
        assert [(one["ServiceAddress"], one["ServicePort"], one["ServiceID"]) for one in entries] == [
            ("10.0.0.1", 8080, "t1"),
            ("10.0.0.2", 8080, "t2"),
        ]
        assert entries[0]["ServiceTags"] == list(TAGS)
        assert entries[0]["ServiceMeta"] == {"stack": "shop"}
        assert [one["Service"]["ID"] for one in healths] == ["t1", "t2"], "in the order of the catalog"
        assert {check["Status"] for one in healths for check in one["Checks"]} == {"passing"}
        _, tagged, _ = await get("/v1/catalog/service/web?tag=traefik.enable%3Dtrue")
        assert [one["ServiceID"] for one in tagged] == ["t1"]


async def test_traefik_3_notices_instances_by_the_state_of_all_checks(known: KnownCatalog) -> None:
    """Its watch ignores a response without other names or tags, so the list of services does not suffice."""
    view = ConsulView(known)
    async with consul(known, view) as get:
        status, checks, index = await get("/v1/health/state/any")
        assert (status, [one["ServiceID"] for one in checks], index) == (200, ["t1", "t2"], 101)
        assert {one["Status"] for one in checks} == {"passing"}
        waiting = asyncio.create_task(get(f"/v1/health/state/any?index={index}"))
        await eventually(lambda: view.queries.held)
        known.replace("b", a_catalog(ONE))
        assert [one["ServiceID"] for one in (await waiting)[1]] == ["t1"]
        assert len((await get("/v1/health/state/passing"))[1]) == 1
        assert (await get("/v1/health/state/critical"))[1] == []


async def test_every_view_has_the_weights_of_a_staged_update(known: KnownCatalog) -> None:
    known.replace("b", a_catalog(replace(ONE, weight=19), replace(TWO, weight=99_999)))
    async with consul(known) as get:
        _, entries, _ = await get("/v1/catalog/service/web")
        assert [one["ServiceWeights"]["Passing"] for one in entries] == [19, 256]
        _, healths, _ = await get("/v1/health/service/web?passing=1")
        assert [one["Service"]["Weights"]["Passing"] for one in healths] == [19, 256]
    async with serving_names(DnsView(known, list.reverse), "127.0.0.1", 0) as port:
        assert await Resolver(port).answers("web.service.consul", "SRV") == [
            "1 19 8080 0a000001.addr.dc1.consul.",
            "1 256 8080 0a000002.addr.dc1.consul.",
        ]
    assert values_of(known)["/skep/weights/web/t1"] == "19"


def test_an_instance_is_first_in_dns_as_often_as_its_weight_demands() -> None:
    random, first = Random(3), Counter[str]()
    shuffle = weighted_shuffle(random.random)
    for _ in range(2000):
        found = [replace(ONE, weight=19), TWO]
        shuffle(found)
        first[found[0].id] += 1
    assert 60 < first["t2"] < 145, first


async def test_consul_templates_blocking_query_ends_with_a_change(known: KnownCatalog) -> None:
    """The call of consul-template 0.29, dependency/health_service.go, with the index of the response before."""
    view = ConsulView(known)
    async with consul(known, view) as get:
        path = "/v1/health/service/web?passing=1&stale="
        _, _, index = await get(path)
        waiting = asyncio.create_task(get(f"{path}&index={index}&wait=60000ms"))
        await eventually(lambda: view.queries.held)
        assert (await get(f"{path}&index={index}&wait=20ms"))[2] == index
        assert not waiting.done()
        known.replace("b", a_catalog(ONE))
        _, entries, later = await waiting
        assert [one["Service"]["ID"] for one in entries] == ["t1"]
        assert later > index
        assert (await get(f"{path}&index={later + 5}&wait=60000ms"))[2] == later, "an index of an earlier run"


async def test_nodes_and_datacenters_are_those_of_consul(known: KnownCatalog) -> None:
    known.replace(
        "b",
        a_catalog(
            ONE,
            db=CatalogService(
                name="db",
                instances=(
                    CatalogInstance(
                        id="db1",
                        node="db1",
                        node_address="192.0.2.7",
                        address="192.0.2.7",
                        is_registered=True,
                    ),
                ),
            ),
        ),
    )
    async with consul(known) as get:
        assert (await get("/v1/catalog/datacenters"))[1] == ["dc1"]
        nodes = (await get("/v1/catalog/nodes"))[1]
        assert [(one["Node"], one["Address"]) for one in nodes] == [("db1", "192.0.2.7"), ("n1", "10.0.0.1")]
        assert (await get("/v1/catalog/node/n1"))[1]["Services"].keys() == {"t1"}
        assert (await get("/v1/catalog/node/none"))[:2] == (200, None)
        assert (await get("/v1/catalog/service/none"))[:2] == (200, [])
        assert (await get("/v1/kv/some/key"))[0] == 404
        assert (await get("/v1/catalog/services?dc=other"))[:2] == (500, "No path to datacenter")


async def test_changes_and_requests_of_web_pages_are_refused(known: KnownCatalog) -> None:
    async with consul(known) as get:
        for method in ("PUT", "POST", "DELETE"):
            assert (await get("/v1/kv/key", method))[0] == 405
        assert (await get("/v1/catalog/services", Origin="http://evil.example"))[0] == 403
        assert (await get("/v1/catalog/services", Host="evil.example"))[0] == 403
        assert (await get("/v1/catalog/services", Host="localhost:8500"))[0] == 200
        assert (await get("/v1/catalog/services?filter=x"))[0] == 400
        assert (await get("/v1/catalog/services?index=x"))[0] == 400
        assert (await get("/v1/catalog/services?index=101&wait=soon"))[0] == 400


async def test_prometheus_discovery_finds_addresses_and_tags(known: KnownCatalog) -> None:
    """The calls of Prometheus 2.42, discovery/consul/consul.go, which Debian's build leaves out."""
    async with consul(known) as get:
        assert (await get("/v1/agent/self"))[1]["Config"]["Datacenter"] == "dc1"
        _, services, index = await get("/v1/catalog/services?dc=dc1&stale=&wait=30000ms")
        assert list(services) == ["web"]
        _, nodes, _ = await get(f"/v1/health/service/web?dc=dc1&index={index - 1}&stale=&wait=30000ms")
        entry = nodes[0]
        found = entry["Node"]["Node"], entry["Node"]["Address"], entry["Node"]["Datacenter"]
        assert found == ("n1", "10.0.0.1", "dc1")
        assert (entry["Service"]["Address"], entry["Service"]["Port"]) == ("10.0.0.1", 8080)
        assert entry["Service"]["Tags"] == list(TAGS)


# -- DNS -------------------------------------------------------------------------------------------------------------


class Resolver:
    """Queries over UDP and TCP."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def ask(self, name: str, type: str = "A", *, tcp: bool = False) -> dnslib.DNSRecord:
        question = dnslib.DNSRecord.question(name, type)
        answer = await asyncio.to_thread(question.send, "127.0.0.1", self._port, tcp=tcp, timeout=5)
        return dnslib.DNSRecord.parse(answer)

    async def answers(self, name: str, type: str = "A") -> list[str]:
        return sorted(str(one.rdata) for one in (await self.ask(name, type)).rr)


async def test_names_have_addresses_and_ports(known: KnownCatalog) -> None:
    async with serving_names(DnsView(known, list.reverse), "127.0.0.1", 0) as port:
        resolver = Resolver(port)
        both = ["10.0.0.1", "10.0.0.2"]
        assert await resolver.answers("web.service.consul") == both
        assert await resolver.answers("WEB.service.dc1.consul.") == both
        assert await resolver.answers("traefik.enable=true.web.service.consul") == ["10.0.0.1"]
        assert await resolver.answers("n1.node.consul") == ["10.0.0.1"]
        assert await resolver.answers("_web._tcp.service.consul", "SRV") == [
            "1 1 8080 0a000001.addr.dc1.consul.",
            "1 1 8080 0a000002.addr.dc1.consul.",
        ]
        srv = await resolver.ask("web.service.consul", "SRV")
        assert sorted(str(one.rdata) for one in srv.ar) == both
        assert str(srv.rr[0].rdata).endswith("0a000002.addr.dc1.consul."), "the order is the shuffle's"
        assert await resolver.answers("0a000002.addr.dc1.consul") == ["10.0.0.2"]


async def test_unknown_names_and_other_zones_have_their_codes(known: KnownCatalog) -> None:
    async with serving_names(DnsView(known, list.reverse), "127.0.0.1", 0) as port:
        resolver = Resolver(port)
        codes = dnslib.RCODE
        assert (await resolver.ask("none.service.consul")).header.rcode == codes.NXDOMAIN
        assert (await resolver.ask("other.web.service.consul")).header.rcode == codes.NXDOMAIN
        assert (await resolver.ask("example.org")).header.rcode == codes.REFUSED
        assert (await resolver.ask("xconsul")).header.rcode == codes.REFUSED
        no_data = await resolver.ask("web.service.consul", "AAAA")
        assert (no_data.header.rcode, no_data.rr) == (codes.NOERROR, [])


async def test_a_long_answer_is_truncated_over_udp_and_whole_over_tcp(known: KnownCatalog) -> None:
    many = [an_instance(f"t{number}", f"10.0.1.{number}") for number in range(1, 101)]
    known.replace("b", a_catalog(*many))
    async with serving_names(DnsView(known, list.reverse), "127.0.0.1", 0) as port:
        resolver = Resolver(port)
        assert (await resolver.ask("web.service.consul")).header.tc
        assert len((await resolver.ask("web.service.consul", tcp=True)).rr) == 100


# -- etcd ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def etcdctl(known: KnownCatalog) -> AsyncIterator[Callable[..., Any]]:
    program = shutil.which("etcdctl", path=SEARCHED)
    assert program is not None
    async with serving_keys(EtcdView(known), "127.0.0.1", 0) as port:

        async def start(*words: str) -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                program,
                f"--endpoints=127.0.0.1:{port}",
                *words,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={"ETCDCTL_API": "3"},
            )

        yield start


async def said(process: asyncio.subprocess.Process, stdin: bytes = b"") -> str:
    output, _ = await process.communicate(stdin)
    return output.decode()


async def test_etcdctl_reads_ranges_of_keys(etcdctl: Callable[..., Any]) -> None:
    assert (await said(await etcdctl("get", "--prefix", "/skep/services/"))).split("\n")[:4] == [
        "/skep/services/web/t1",
        "10.0.0.1:8080",
        "/skep/services/web/t2",
        "10.0.0.2:8080",
    ]
    assert json.loads(await said(await etcdctl("get", "--print-value-only", "/skep/tags/web/t1"))) == [*TAGS]
    assert await said(await etcdctl("get", "/skep/nodes/n1", "--print-value-only")) == "10.0.0.1\n"
    words = (
        "get",
        "--prefix",
        "/skep/services/",
        "--keys-only",
        "--order=DESCEND",
        "--sort-by=KEY",
        "--limit=1",
    )
    assert (await said(await etcdctl(*words))).split() == ["/skep/services/web/t2"]
    assert await said(await etcdctl("get", "/skep/none")) == ""
    found = json.loads(await said(await etcdctl("get", "--from-key", "/skep/services/web/t2", "-w", "json")))
    assert (found["count"], found["header"]["revision"]) == (5, 101)
    assert "skep" in await said(await etcdctl("member", "list"))


async def test_confds_transaction_of_ranges_is_answered_at_one_revision(
    known: KnownCatalog, etcdctl: Callable[..., Any]
) -> None:
    """The call of confd's etcdv3 backend: a transaction of ranges without comparisons, by descending keys."""
    script = b"\nget --prefix /skep/services/ --order=DESCEND --sort-by=KEY\nget --prefix /skep/nodes/\n\n\n"
    found = await said(await etcdctl("txn"), script)
    assert found.split() == [
        "SUCCESS",
        *("/skep/services/web/t2", "10.0.0.2:8080", "/skep/services/web/t1", "10.0.0.1:8080"),
        *("/skep/nodes/n1", "10.0.0.1"),
    ]
    known.replace("b", a_catalog(ONE))
    former = await said(await etcdctl("get", "--rev=101", "--prefix", "/skep/services/", "--keys-only"))
    assert former.split() == ["/skep/services/web/t1", "/skep/services/web/t2"]
    assert "future revision" in await said(await etcdctl("get", "--rev=999", "x"))


async def test_a_watch_gets_each_change_also_past_ones(
    known: KnownCatalog, etcdctl: Callable[..., Any]
) -> None:
    watch = await etcdctl("watch", "--prefix", "/skep/services/", "--prev-kv", "--rev=102")
    known.replace("b", a_catalog(ONE))
    assert await lines(watch, 4) == [
        "DELETE",
        "/skep/services/web/t2",
        "10.0.0.2:8080",
        "/skep/services/web/t2",
    ]
    known.replace("c", a_catalog(an_instance("t1", "10.0.0.3")))
    assert await lines(watch, 5) == [
        "",
        "PUT",
        "/skep/services/web/t1",
        "10.0.0.1:8080",
        "/skep/services/web/t1",
    ]
    late = await etcdctl("watch", "--prefix", "/skep/services/", "--rev=102")
    assert await lines(late, 2) == ["DELETE", "/skep/services/web/t2"]
    for process in (watch, late):
        process.kill()
        await process.wait()


async def lines(process: asyncio.subprocess.Process, count: int) -> list[str]:
    async with asyncio.timeout(20):
        return [(await process.stdout.readline()).decode().rstrip("\n") for _ in range(count)]


async def test_old_revisions_are_refused_as_compacted(
    known: KnownCatalog, etcdctl: Callable[..., Any]
) -> None:
    for number in range(KEPT_MAX + 5):
        known.replace(str(number), a_catalog(an_instance("t1", "10.0.0.1", 1000 + number)))
        await said(await etcdctl("get", "/skep/nodes/n1")) if number % 20 == 0 else None
    assert "compacted" in await said(await etcdctl("get", "--rev=90", "x"))
    assert "compacted" in await said(await etcdctl("watch", "--rev=90", "x"))


async def test_changes_are_refused(etcdctl: Callable[..., Any]) -> None:
    for words in (("put", "a", "b"), ("del", "a"), ("lease", "grant", "10"), ("compact", "5")):
        process = await etcdctl(*words)
        assert "read-only" in await said(process), words
        assert process.returncode != 0
    assert "read-only" in await said(await etcdctl("txn"), b"\nput a b\n\n\n")


# -- the command -----------------------------------------------------------------------------------------------------


async def test_the_command_serves_all_interfaces_until_it_is_stopped(tmp_path: Path) -> None:
    socket = tmp_path / "m.sock"
    async with a_manager_api() as api, served(api, socket):
        await api.store.update(raise_level)
        await api.store.update(register, REGISTRATION)
        words = (
            "--host",
            f"unix://{socket}",
            "catalog",
            "serve",
            "--consul",
            "0",
            "--dns",
            "0",
            "--etcd",
            "0",
        )
        process = await asyncio.create_subprocess_exec(SKEP, *words, stdout=asyncio.subprocess.PIPE)
        places = [line.split(" at 127.0.0.1:") for line in await lines(process, 3)]
        assert [name for name, _ in places] == ["consul", "dns", "etcd"]
        ports = [int(port) for _, port in places]
        async with (
            ClientSession() as session,
            session.get(f"http://127.0.0.1:{ports[0]}/v1/catalog/service/db") as response,
        ):
            assert [one["ServiceAddress"] for one in await response.json()] == ["192.0.2.7"]
            assert int(response.headers["X-Consul-Index"]) > 1_600_000_000_000, "it grows over restarts"
        assert await Resolver(ports[1]).answers("db.service.consul") == ["192.0.2.7"]
        process.terminate()
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "at least one of --consul"),
        (("--dns", "localhost:53"), "IP address"),
        (("--etcd", "70000"), "[ADDRESS:]PORT"),
    ],
)
def test_places_that_cannot_be_served_are_refused(words: tuple[str, ...], reason: str) -> None:
    done = CliRunner().invoke(main, ["catalog", "serve", *words])
    assert done.exit_code == 2
    assert reason in done.output
