"""When a certificate is renewed, and which assignments are taken."""

from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.agent.renewal import renewal_time
from skep.errors import FailedPrecondition
from skep.model.node_reports.revisions import Revision, advanced

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
