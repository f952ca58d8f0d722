"""Certificates from an external authority, over real mutual TLS on loopback: node, manager, authority."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace
from structlog.testing import capture_logs

from skep.agent.certificates import join, renew
from skep.aio.clock import SystemClock
from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.manager.ca.external import ALL_S, CallLimits, ExternalAuthorities
from skep.manager.ca.signing import CertificateSigner
from skep.manager.control.swarm import Rotations, roots_of, update_swarm
from skep.manager.nodes.revocation import is_revoked, revoke
from skep.model.node import Node, NodeRole
from skep.model.swarm import CAConfig, ExternalCA
from skep.model.values.ids import NodeId, new_id
from skep.security.authority import Authority
from skep.security.external import check_external_authorities
from skep.security.identity import NodeIdentity
from skep.security.keys import new_private_key, signing_request
from skep.security.trust import tls_info
from skep.store.interface import Store
from skep.store.kinds import NEXT_ROOT_KEY_ID, ROOT_KEY_ID, Payload, Revocation
from skep.store.memory import MemoryStore
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_worker, an_agent, pair_of
from tests.support.security.external_ca import Certificate, ExternalAuthority

CLOCK = SystemClock()
OWN = Authority.create()


@pytest.fixture
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """A manager that leads."""
    made = Cluster(heartbeat_s=3, calls=getattr(request, "param", CallLimits()))
    async with made.serving() as serving, serving.leading(), leader(serving.store):
        yield serving


@asynccontextmanager
async def leader(store: Any) -> AsyncIterator[None]:
    """The store names this manager as leader."""
    terms = store.terms(MANAGER_ID, "127.0.0.1:1")
    await anext(terms)
    try:
        yield
    finally:
        await terms.aclose()


async def update(cluster: Cluster, config: CAConfig) -> None:
    """What ``docker swarm ca`` and ``docker swarm update`` do."""
    swarm = cluster.swarm
    prepared = await cluster.external.prepare(swarm, roots_of(cluster.view, swarm), config)
    await cluster.store.update(
        update_swarm,
        replace(swarm.spec, ca_config=config),
        swarm.version.index,
        Rotations(),
        new_id=new_id,
        now=datetime.now(UTC),
        prepared=prepared,
    )


def named(*authorities: ExternalAuthority, root: Authority | None = None, **more: Any) -> CAConfig:
    """A config with these authorities, which sign with their own root or with ``root``."""
    cas = tuple(
        ExternalCA(protocol="CFSSL", url=one.url, ca_cert=(root or one.root).root_pem.decode())
        for one in authorities
    )
    return CAConfig(external_cas=cas, **more)


def rotating_to(authority: ExternalAuthority) -> CAConfig:
    return named(authority, signing_ca_cert=authority.root.root_pem.decode())


async def rotated(cluster: Cluster) -> None:
    await cluster.until(lambda _: not cluster.swarm.root_rotation_in_progress)


async def join_worker(cluster: Cluster) -> Any:
    return await join(cluster.address, cluster.swarm.join_tokens.worker, CLOCK)


async def test_nodes_join_and_renew_with_certificates_of_an_authority_with_the_clusters_root(cluster):
    async with ExternalAuthority(cluster.authority).serving() as authority:
        await update(cluster, named(authority))
        assert cluster.swarm.spec.ca_config.external_cas[0].protocol == "cfssl"
        pair = await join_worker(cluster)
        (request,) = authority.requests
        assert request["hosts"] == ["swarm-worker", pair.identity.node_id]
        assert request["subject"] == {
            "CN": pair.identity.node_id,
            "names": [{"OU": "swarm-worker", "O": cluster.id}],
        }
        assert authority.callers == [MANAGER_ID]
        renewed = await renew(cluster.address, pair, CLOCK)
        assert renewed.identity == pair.identity
        assert renewed.certificate.serial_number != pair.certificate.serial_number
        assert len(authority.requests) == 2


async def test_the_root_rotates_to_an_external_authority_and_back(cluster, tmp_path):
    old, theirs = cluster.swarm.tls_info.trust_root, Authority.create()
    before = await a_worker(cluster, tmp_path / "w")
    async with (
        cluster.own_agent(tmp_path / "m"),
        an_agent(cluster, before, tmp_path / "w") as (agent, _),
        ExternalAuthority(theirs, cluster.authority).serving() as authority,
    ):
        await update(cluster, rotating_to(authority))
        assert cluster.view.lookup(Payload, NEXT_ROOT_KEY_ID) is None
        await rotated(cluster)
        assert cluster.swarm.tls_info.trust_root == theirs.root_pem.decode()
        assert cluster.view.lookup(Payload, ROOT_KEY_ID) is None  # no manager has it
        assert {request["subject"]["CN"] for request in authority.requests} == {MANAGER_ID, agent.node_id}
        pair_of(agent).certificate.verify_directly_issued_by(theirs.certificate)

        await update(cluster, named(authority, force_rotate=1))
        assert authority.requests[-1]["profile"] == "CA"
        await rotated(cluster)
    assert cluster.swarm.tls_info.trust_root not in {old, theirs.root_pem.decode()}
    assert cluster.view.lookup(Payload, ROOT_KEY_ID) is not None


async def test_the_key_of_the_present_root_goes_to_an_authority_and_comes_back(cluster):
    root = cluster.authority
    async with ExternalAuthority(root).serving() as authority:
        await update(cluster, rotating_to(authority))
        assert cluster.swarm.rotation is None
        assert cluster.view.lookup(Payload, ROOT_KEY_ID) is None
        await join_worker(cluster)
        assert len(authority.requests) == 1
    back = CAConfig(signing_ca_cert=root.root_pem.decode(), signing_ca_key=root.key_pem.decode())
    await update(cluster, back)  # the authority is away, and not needed
    await join_worker(cluster)
    assert len(authority.requests) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "there must be at least one valid, reachable external CA corresponding to the desired CA"),
        ({"external_cas": (ExternalCA(protocol="acme", url="https://x"),)}, 'invalid protocol: "acme"'),
        ({"external_cas": (ExternalCA(protocol="cfssl", url="http://x"),)}, "must begin with https://"),
        *(
            ({"external_cas": (ExternalCA(protocol="cfssl", url=url),)}, "must have a host")
            for url in (
                "https://",
                "https:///sign",
                "https://:8888/",
                "https://x:99999/",
                "https://[::1/",
                "https://x:0",
            )
        ),
        ({"external_cas": (ExternalCA(protocol="cfssl", url="https://x", ca_cert="x"),)}, "cannot be read"),
        ({"external_cas": (ExternalCA(protocol="cfssl", url="https://x"),) * 17}, "at most 16 external CAs"),
        (
            {"external_cas": (ExternalCA(protocol="cfssl", url="https://x", options={"a": "b"}),)},
            "option 'a'",
        ),
    ],
)
async def test_a_root_without_an_authority_that_can_be_called_is_refused(cluster, more, message):
    with pytest.raises(InvalidArgument, match=message):
        await update(cluster, CAConfig(signing_ca_cert=OWN.root_pem.decode(), **more))


async def test_an_authority_that_is_away_or_of_another_root_is_no_reachable_one(cluster):
    async with ExternalAuthority(Authority.create()).serving() as other:
        lying = ExternalAuthority(OWN)
        lying.url = other.url  # its own certificate is another root's
        with pytest.raises(InvalidArgument, match="corresponding to the desired CA certificate"):
            await update(cluster, rotating_to(lying))
    with pytest.raises(InvalidArgument, match="corresponding to the desired CA certificate"):
        await update(cluster, rotating_to(lying))
    assert cluster.swarm.rotation is None


async def test_rotating_from_one_authority_to_another_is_refused_with_dockers_text(cluster):
    async with (
        ExternalAuthority(cluster.authority).serving() as present,
        ExternalAuthority(Authority.create(), cluster.authority).serving() as other,
    ):
        await update(cluster, rotating_to(present))
        with pytest.raises(
            InvalidArgument, match="from one external CA to a different external CA is not supp"
        ):
            await update(cluster, named(present, other, signing_ca_cert=other.root.root_pem.decode()))


async def test_an_update_that_is_not_about_certificates_needs_no_authority(cluster):
    async with ExternalAuthority(cluster.authority).serving() as authority:
        await update(cluster, rotating_to(authority))
    config = cluster.swarm.spec.ca_config
    await update(cluster, replace(config, node_cert_expiry=2 * 3600 * 10**9))
    with pytest.raises(InvalidArgument, match="corresponding to the current CA certificate"):
        await update(cluster, replace(config, force_rotate=1))


ANOTHER_KEY = new_private_key().public_key()
LIES: dict[str, tuple[Callable[[Certificate], object], str]] = {
    "another key": (lambda it: setattr(it, "key", ANOTHER_KEY), "it is for another key"),
    "another node": (lambda it: it.subject.__setitem__(-1, ("CN", "n1")), "its subject differs"),
    "another role": (lambda it: it.subject.__setitem__(0, ("OU", "swarm-manager")), "its subject differs"),
    "another cluster": (lambda it: it.subject.__setitem__(1, ("O", "c1")), "its subject differs"),
    "two roles": (lambda it: it.subject.insert(0, ("OU", "swarm-manager")), "its subject differs"),
    "no names": (lambda it: setattr(it, "hosts", []), "it lacks the name"),
    "a manager's name": (lambda it: setattr(it, "hosts", [*it.hosts, "swarm-manager"]), "not requested"),
    "an authority": (lambda it: setattr(it, "is_authority", True), "it may sign certificates"),
    "signs": (lambda it: setattr(it, "signs_certificates", True), "its key may sign certificates"),
    "no client": (lambda it: setattr(it, "uses", it.uses[:1]), "not for servers and clients"),
    "expired": (lambda it: setattr(it, "not_after", it.not_before + timedelta(minutes=4)), "expires too soon"),
    "too short": (lambda it: setattr(it, "not_after", it.not_before + timedelta(minutes=64)), "expires too soon"),
    "not yet": (lambda it: setattr(it, "not_before", it.not_before + timedelta(hours=1)), "it is not valid before"),
    "another root": (lambda it: setattr(it, "root", OWN), "not signed by the cluster's root"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
async def test_what_an_authority_should_not_sign_is_refused_and_the_next_one_is_called(cluster, lie):
    async with (
        ExternalAuthority(cluster.authority).serving() as liar,
        ExternalAuthority(cluster.authority).serving() as honest,
    ):
        liar.lie, reason = LIES[lie]
        await update(cluster, named(liar))
        with pytest.raises(Unavailable, match=reason):
            await join_worker(cluster)
        await update(cluster, named(liar, honest))
        pair = await join_worker(cluster)
        assert len(liar.requests) == 2
        assert len(honest.requests) == 1
        assert cluster.node(pair.identity.node_id).certificate is not None


async def failing(_request: web.Request) -> web.StreamResponse:
    return web.Response(status=500)


async def refusing(_request: web.Request) -> web.StreamResponse:
    errors = [{"code": 5200, "message": "Request does not match policy whitelist"}]
    return web.json_response({"success": False, "result": None, "errors": errors}, status=400)


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with suppress(ConnectionError):
        while True:
            await response.write(b" " * 65536)
            await asyncio.sleep(0)  # aiohttp only waits while its buffer is full
    return response


async def elsewhere(_request: web.Request) -> web.StreamResponse:
    raise web.HTTPTemporaryRedirect("https://127.0.0.1:1/")


def json(value: object) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def respond(_request: web.Request) -> web.StreamResponse:
        return web.json_response(value)

    return respond


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        (failing, "unexpected status code in CSR response: 500"),
        (refusing, "does not match policy whitelist"),
        (endless, "longer than 262144 bytes"),
        (elsewhere, "unexpected status code in CSR response: 307"),
        (json([]), "the response is not cfssl's"),
        (json({"success": True}), "no reason given"),
        (json({"success": True, "result": {"certificate": "x"}}), "cannot be read"),
    ],
)
async def test_a_response_without_a_certificate_is_refused_with_its_reason(cluster, respond, reason):
    async with ExternalAuthority(cluster.authority).serving() as authority:
        await update(cluster, named(authority))
        authority.respond = respond
        with pytest.raises(Unavailable, match=reason):
            await join_worker(cluster)


@pytest.mark.parametrize("cluster", [CallLimits(call_s=0.3, first_retry_s=20.0)], indirect=True)
async def test_a_silent_authority_has_its_deadline_and_is_left_out_for_a_while(cluster):
    silence = asyncio.Event()

    async def silent(_request: web.Request) -> web.StreamResponse:
        await silence.wait()
        return web.Response()

    async with (
        ExternalAuthority(cluster.authority).serving() as authority,
        ExternalAuthority(cluster.authority).serving() as other,
    ):
        await update(cluster, named(authority))
        authority.respond = silent
        with pytest.raises(Unavailable, match=r"no response within 0\.3 s"):
            await join_worker(cluster)
        with pytest.raises(Unavailable, match="skipped after a failure"):
            await join_worker(cluster)
        assert len(authority.requests) == 1
        await update(cluster, named(authority, other))
        await join_worker(cluster)  # by the other one, without another wait
        assert len(authority.requests) == 1
        silence.set()


def a_caller(cluster: Cluster) -> Caller:
    """Another manager."""
    identity = cluster.pair("other", NodeRole.MANAGER).identity
    return Caller(address="", identity=identity, disconnect=lambda: None)


async def test_the_leader_alone_calls_the_authority(cluster):
    called: list[NodeId] = []

    class Link:
        """To the leader, without a network between."""

        async def call(self, _method: object, request: Any, *, timeout_s: float) -> Any:
            caller = a_caller(cluster)
            called.append(NodeId(request.node_id))
            assert timeout_s > ALL_S
            return await leading.sign_for_manager(request, caller)

    def signer(own: NodeId, store: Store) -> CertificateSigner:
        authorities = ExternalAuthorities(lambda: cluster.tls.pair, CLOCK, Random(1))
        return CertificateSigner(store, own, authorities, lambda _: Link(), CLOCK)  # type: ignore[arg-type,return-value]

    leading, following = signer(MANAGER_ID, cluster.store), signer(NodeId("other"), cluster.store)
    identity = NodeIdentity(node_id=NodeId("n1"), cluster_id=cluster.id, role=NodeRole.WORKER)
    async with ExternalAuthority(cluster.authority).serving() as authority:
        await update(cluster, named(authority))
        signed = await following.sign(signing_request(new_private_key()), identity)
        assert called == ["n1"]
        assert len(authority.requests) == 1
        assert b"BEGIN CERTIFICATE" in signed.certificate_pem
        request = skep.SignExternallyRequest(csr=b"", node_id=identity.node_id)
        with pytest.raises(Unavailable, match="no longer the leader"):
            await following.sign_for_manager(request, a_caller(cluster))


async def test_a_certificate_of_the_leaders_former_root_is_not_recorded_as_one_of_the_next_root(cluster):
    """The leader has not seen yet that the root has changed, and the requesting manager has."""

    class Link:
        """To the leader, without a network between."""

        async def call(self, _method: object, request: Any, *, timeout_s: float) -> Any:
            return await leading.sign_for_manager(request, a_caller(cluster))

    def signer(own: NodeId, store: Store) -> CertificateSigner:
        authorities = ExternalAuthorities(lambda: cluster.tls.pair, CLOCK, Random(1))
        return CertificateSigner(store, own, authorities, lambda _: Link(), CLOCK)  # type: ignore[arg-type,return-value]

    newer = MemoryStore(CLOCK)
    leading, following = signer(MANAGER_ID, cluster.store), signer(NodeId("other"), newer)
    identity = NodeIdentity(node_id=NodeId("n1"), cluster_id=cluster.id, role=NodeRole.WORKER)
    async with ExternalAuthority(cluster.authority).serving() as authority, leader(newer):
        await update(cluster, named(authority))
        spec = replace(cluster.swarm.spec, ca_config=named(authority, root=OWN))
        swarm = replace(cluster.swarm, spec=spec, tls_info=tls_info(OWN.root_pem))
        await newer.update(lambda tx: tx.put(swarm))
        with pytest.raises(Unavailable, match="not signed by the cluster's root"):
            await following.sign(signing_request(new_private_key()), identity)
        assert len(authority.requests) == 1


async def test_a_token_that_is_replaced_while_an_authority_signs_admits_no_node(cluster):
    async with ExternalAuthority(cluster.authority).serving() as authority:
        await update(cluster, named(authority))

        async def respond(request: web.Request) -> web.StreamResponse:
            swarm = cluster.swarm
            await cluster.store.update(
                update_swarm,
                swarm.spec,
                swarm.version.index,
                Rotations(worker_token=True),
                new_id=new_id,
                now=datetime.now(UTC),
            )
            signed = authority.signed(await request.json()).decode()
            return web.json_response({"success": True, "result": {"certificate": signed}})

        authority.respond = respond
        before = cluster.view.find(Node)
        with pytest.raises(InvalidArgument, match="A valid join token is necessary"):
            await join_worker(cluster)
        assert cluster.view.find(Node) == before


async def test_a_demoted_managers_certificate_is_revoked_whatever_its_date(cluster):
    """cfssl backdates by five minutes: by its age alone the certificate would seem to be from after the demotion."""
    async with ExternalAuthority(cluster.authority).serving() as authority:
        await update(cluster, named(authority))
        pair = await join(cluster.address, cluster.swarm.join_tokens.manager, CLOCK)
    node = cluster.node(pair.identity.node_id)
    now_ns = CLOCK.now_ns()
    await cluster.store.update(lambda tx: revoke(tx, node, now_ns, is_removed=False))
    revocation = cluster.view.get(Revocation, node.id)
    serial = f"{pair.certificate.serial_number:x}"
    issued_s = int(pair.certificate.not_valid_before_utc.timestamp()) + 3600
    assert not is_revoked(revocation, issued_s)
    assert is_revoked(revocation, issued_s, serial)


async def test_a_certificate_that_would_count_as_revoked_is_refused(cluster):
    async with ExternalAuthority(cluster.authority).serving() as authority:
        await update(cluster, named(authority))
        pair = await join(cluster.address, cluster.swarm.join_tokens.manager, CLOCK)
        node = cluster.node(pair.identity.node_id)
        now_ns = CLOCK.now_ns()
        await cluster.store.update(lambda tx: revoke(tx, node, now_ns, is_removed=False))
        authority.lie = lambda it: setattr(it, "not_before", it.not_before - timedelta(days=1))
        with pytest.raises(SkepError, match="it counts as revoked"):
            await renew(cluster.address, pair, CLOCK)


@pytest.mark.parametrize("cluster", [CallLimits(call_s=30.0)], indirect=True)
async def test_authorities_that_are_silent_are_tried_together(cluster: Cluster) -> None:
    """A request of the API waits for them: sixteen after one another would take more than a minute."""
    connected: set[asyncio.StreamWriter] = set()
    all_there = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.add(writer)
        if len(connected) == 16:
            all_there.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    urls = [f"https://127.0.0.1:{port}/{number}" for number in range(16)]
    asked = asyncio.create_task(cluster.external.is_reachable(urls, OWN.root_pem))
    await all_there.wait()
    for writer in connected:
        writer.close()
    assert not await asked
    server.close()


@pytest.mark.parametrize("path", ["", "/sign"])
async def test_the_password_of_an_authority_is_in_no_log_and_no_error(cluster: Cluster, path: str) -> None:
    url = f"https://ca:hush-7391@127.0.0.1:1{path}"
    with capture_logs() as logs:
        assert not await cluster.external.is_reachable([url], OWN.root_pem)
        with pytest.raises(Unavailable, match=f"https://ca:xxxxx@127.0.0.1:1{path}: ") as raised:
            await cluster.external.sign([url], b"", OWN.root_pem, lambda certificate: certificate)
    assert len(logs) == 2
    assert "hush-7391" not in f"{logs} {raised.value}"
    wrong = ExternalCA(protocol="cfssl", url=f"https://ca:hush-7391@x:99999{path}")
    with pytest.raises(InvalidArgument) as refused:
        check_external_authorities(CAConfig(external_cas=(wrong,)))
    assert "hush-7391" not in str(refused.value)
