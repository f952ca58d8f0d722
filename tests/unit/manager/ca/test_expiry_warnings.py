"""Who is warned of certificates, and when."""

from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.ca.admission import stamp
from skep.manager.ca.expiry_warnings import expiring
from skep.model.node import Node, NodeCertificate, NodeDescription
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import SECOND_NS
from skep.security.authority import Authority
from skep.security.trust import tls_info
from skep.store.memory import MemoryStore

NOW = datetime.now(UTC)
ROOT = Authority.create()


def a_swarm(lifetime: timedelta = timedelta(days=90)) -> Swarm:
    config = replace(DEFAULT_SWARM_SPEC.ca_config, node_cert_expiry=int(lifetime.total_seconds()) * SECOND_NS)
    spec = replace(DEFAULT_SWARM_SPEC, ca_config=config)
    return Swarm(id=ClusterId("c"), spec=spec, tls_info=tls_info(ROOT.root_pem))


def a_node(id: str, left: timedelta) -> Node:
    return Node(
        id=NodeId(id),
        description=NodeDescription(hostname=f"host-{id}"),
        certificate=NodeCertificate(not_after=stamp(NOW + left)),
    )


async def warned(swarm: Swarm, *nodes: Node, now: datetime = NOW) -> list[str]:
    store = MemoryStore(SystemClock())
    await store.update(lambda tx: [tx.put(object) for object in (swarm, *nodes)])
    return [expiry.warning for expiry in expiring(store.view(), now)]


async def test_a_node_that_renews_in_time_is_no_reason_for_a_warning():
    """With 90 days a node renews when it has between 45 and 18 days left."""
    nodes = [a_node(f"n{days}", timedelta(days=days)) for days in (19, 29, 45, 90)]
    assert await warned(a_swarm(), *nodes) == []


async def test_a_node_that_has_not_renewed_is_named_with_the_day():
    (late,) = await warned(a_swarm(), a_node("n1", timedelta(days=17)))
    assert late.startswith("WARNING: the certificate of node host-n1 expires on ")
    (gone,) = await warned(a_swarm(), a_node("n1", -timedelta(days=1)))
    assert "expired on" in gone


async def test_long_lives_are_warned_of_thirty_days_ahead_and_short_ones_later():
    year = a_swarm(timedelta(days=365))
    assert await warned(year, a_node("n1", timedelta(days=31))) == []
    assert len(await warned(year, a_node("n1", timedelta(days=29)))) == 1
    hour = a_swarm(timedelta(hours=1))
    assert await warned(hour, a_node("n1", timedelta(minutes=30))) == []
    assert len(await warned(hour, a_node("n1", timedelta(minutes=20)))) == 1


async def test_the_root_is_warned_of_thirty_days_ahead_with_what_to_do():
    end = ROOT.certificate.not_valid_after_utc
    assert await warned(a_swarm(), now=end - timedelta(days=31)) == []
    (warning,) = await warned(a_swarm(), now=end - timedelta(days=29))
    assert "the swarm's root certificate expires on" in warning
    assert "docker swarm ca --rotate" in warning
