"""Labels by which a plain client says what only Skep knows."""

import pytest

from skep.errors import InvalidArgument
from skep.model.labels import check_service_labels, drain_s, publishes_not_ready


def test_a_task_drains_for_a_second_unless_its_service_says_otherwise() -> None:
    assert drain_s({}) == 1.0
    assert drain_s({"skep.drain": "90s"}) == 90.0
    assert drain_s({"skep.drain": "0s"}) == 0.0


@pytest.mark.parametrize("word", ["soon", "-1s", "", "9000000h"])
def test_a_time_to_drain_that_cannot_be_read_is_refused_and_counts_for_nothing(word: str) -> None:
    with pytest.raises(InvalidArgument, match=r"invalid label skep\.drain=.*want a duration like 30s"):
        check_service_labels({"skep.drain": word})
    assert drain_s({"skep.drain": word}) == 1.0


def test_publishing_before_tasks_are_ready_is_true_or_false():
    check_service_labels({"skep.publish-not-ready": "True"})
    assert publishes_not_ready({"skep.publish-not-ready": "True"})
    assert not publishes_not_ready({})
    with pytest.raises(InvalidArgument, match="want true or false"):
        check_service_labels({"skep.publish-not-ready": "yes"})
