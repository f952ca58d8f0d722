"""When a certificate is renewed, and which assignments are taken."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.world.time import VirtualClock, VirtualLoop
from skep.agent.renewal import KeyPairCredentials, renewal_time
from skep.errors import FailedPrecondition
from skep.model.node import NodeRole
from skep.model.node_reports.revisions import Revision, advanced
from skep.model.values.ids import ClusterId, NodeId
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request

START = datetime(2026, 1, 1, tzinfo=UTC)


@given(st.integers(0, 2**32))
def test_a_certificate_is_renewed_between_half_and_four_fifths_of_its_span(seed):
    span = timedelta(days=90)
    at = renewal_time(START, START + span, Random(seed))
    assert START + 0.499 * span <= at <= START + 0.801 * span


def test_nodes_that_joined_together_do_not_renew_together():
    times = {renewal_time(START, START + timedelta(days=90), Random(seed)) for seed in range(20)}
    assert len(times) == 20


def test_revisions_go_on_and_may_repeat():
    seen = Revision()
    for number in (1, 1, 5):
        seen = advanced(seen, Revision(1, number))
    assert seen == Revision(1, 5)


def test_a_revision_that_goes_back_is_refused():
    with pytest.raises(FailedPrecondition, match=r"revision 1\.4, this node has seen 1\.5"):
        advanced(Revision(1, 5), Revision(1, 4))


def test_a_restored_cluster_starts_counting_again_but_no_older_one_is_obeyed():
    assert advanced(Revision(1, 500), Revision(2, 3)) == Revision(2, 3)
    with pytest.raises(FailedPrecondition):
        advanced(Revision(2, 3), Revision(1, 500))


def test_a_renewal_that_a_manager_requests_does_not_wait_for_the_pause_after_failures(tmp_path: Path):
    """As in Docker: a node that could renew with no manager for long is promoted at once when it reaches one."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    authority, key = Authority.create(), new_private_key()
    identity = NodeIdentity(node_id=NodeId("n1"), cluster_id=ClusterId("c1"), role=NodeRole.WORKER)
    chain = authority.sign(signing_request(key), identity)
    pair = KeyPair(certificate_pem=chain, key_pem=private_pem(key), root_pem=authority.root_pem)
    keypair.save(pair, tmp_path)
    credentials = KeyPairCredentials(tmp_path, clock, Random(1))
    attempts: list[float] = []

    async def live() -> None:
        running = loop.create_task(credentials.run(lambda: attempts.append(clock.monotonic())))
        credentials.want_renewal()
        await clock.sleep(2000)
        while clock.monotonic() - attempts[-1] > 10:
            await clock.sleep(1)
        for request in (lambda: credentials.take_role(NodeRole.MANAGER), credentials.want_renewal):
            before = len(attempts)
            at = clock.monotonic()
            request()
            await clock.sleep(1)
            assert [one - at < 1 for one in attempts[before:]] == [True]
        running.cancel()
        await asyncio.wait([running])

    loop.run_until_complete(live())
    loop.close()
