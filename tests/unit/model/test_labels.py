"""Labels by which a plain client says what only Skep knows."""

import pytest

from skep.errors import InvalidArgument
from skep.model.options.labels import (
    ALLOW_CREDENTIAL_HELPERS,
    RELABEL,
    VolumeAffinity,
    allowed_repositories,
    allows_preemption,
    check_container_labels,
    check_service_labels,
    check_swarm_labels,
    drain_s,
    min_available,
    priority_of,
    publishes_not_ready,
    relabeled,
    volume_affinity,
)


def test_a_task_drains_for_a_second_unless_its_service_says_otherwise() -> None:
    assert drain_s({}) == 1.0
    assert drain_s({"skep.drain": "90s"}) == 90.0
    assert drain_s({"skep.drain": "0s"}) == 0.0


@pytest.mark.parametrize("word", ["soon", "-1s", "", "9000000h"])
def test_a_time_to_drain_that_cannot_be_read_is_refused_and_counts_for_nothing(word: str) -> None:
    with pytest.raises(InvalidArgument, match=r"invalid label skep\.drain=.*expected a duration like 30s"):
        check_service_labels({"skep.drain": word})
    assert drain_s({"skep.drain": word}) == 1.0


def test_publishing_before_tasks_are_ready_is_true_or_false():
    check_service_labels({"skep.publish-not-ready": "True"})
    assert publishes_not_ready({"skep.publish-not-ready": "True"})
    assert not publishes_not_ready({})
    with pytest.raises(InvalidArgument, match="expected true or false"):
        check_service_labels({"skep.publish-not-ready": "yes"})


def test_a_priority_is_a_whole_number_within_bounds() -> None:
    for text in ("-1000", "0", "7", "1000"):
        check_service_labels({"skep.priority": text})
        assert priority_of({"skep.priority": text}) == int(text)
    assert priority_of({}) == 0


@pytest.mark.parametrize("text", ["1001", "-1001", "1.5", "high", "", "--1", "+1", "\u0663", "9" * 5000])
def test_a_priority_that_cannot_be_read_is_refused_and_counts_for_nothing(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"invalid label skep\.priority=.*number from -1000 to 1000"):
        check_service_labels({"skep.priority": text})
    assert priority_of({"skep.priority": text}) == 0


def test_preemption_is_off_unless_the_cluster_says_otherwise() -> None:
    assert not allows_preemption({})
    check_swarm_labels({"skep.preemption": "True"})
    assert allows_preemption({"skep.preemption": "True"})
    with pytest.raises(InvalidArgument, match=r"skep\.preemption=on: expected true or false"):
        check_swarm_labels({"skep.preemption": "on"})


@pytest.mark.parametrize(
    ("former", "affinity"),
    [
        ("return", VolumeAffinity.PREFERRED),
        ("keep", VolumeAffinity.REQUIRED),
        ("spread", VolumeAffinity.NONE),
    ],
)
def test_labels_of_earlier_versions_still_count_and_the_present_ones_win(
    former: str, affinity: VolumeAffinity
) -> None:
    old = {"skep.volumes": former, "skep.allow-helpers": "shop=r.example/a"}
    check_service_labels(old)
    assert volume_affinity(old) is affinity
    assert volume_affinity({**old, "skep.volume-affinity": "none"}) is VolumeAffinity.NONE
    assert allowed_repositories(old) == {"shop": ("r.example/a",)}
    assert allowed_repositories({**old, ALLOW_CREDENTIAL_HELPERS: "shop=r.example/b"}) == {
        "shop": ("r.example/b",)
    }


def test_a_former_label_beside_the_present_one_must_not_contradict_it() -> None:
    check_service_labels({"skep.volumes": "keep", "skep.volume-affinity": "required"})
    with pytest.raises(InvalidArgument, match=r"skep.volumes=keep and skep.volume-affinity=none contradict"):
        check_service_labels({"skep.volumes": "keep", "skep.volume-affinity": "none"})
    same = {"skep.allow-helpers": "shop=r.example/a", ALLOW_CREDENTIAL_HELPERS: "shop=r.example/a"}
    check_swarm_labels(same)
    with pytest.raises(InvalidArgument, match=r"Remove skep.allow-helpers"):
        check_swarm_labels({**same, ALLOW_CREDENTIAL_HELPERS: "shop=r.example/b"})


@pytest.mark.parametrize(
    ("word", "replicas", "kept"),
    [
        ("0", 3, 0),
        ("2", 3, 2),
        ("5", 3, 3),
        ("50%", 3, 2),
        ("100%", 3, 3),
        ("0%", 3, 0),
        ("34%", 3, 2),
        ("80%", 0, 0),
    ],
)
def test_a_minimum_of_available_tasks_is_a_number_or_a_percentage_rounded_up(
    word: str, replicas: int, kept: int
) -> None:
    labels = {"skep.min-available": word}
    check_service_labels(labels)
    assert min_available(labels, replicas) == kept


@pytest.mark.parametrize("word", ["", "%", "-1", "1.5", "101%", "all", "5%%", "٣"])
def test_a_minimum_that_cannot_be_read_is_refused_and_counts_for_nothing(word: str) -> None:
    with pytest.raises(
        InvalidArgument, match=r"invalid label skep\.min-available=.*a number of tasks, or a percent"
    ):
        check_service_labels({"skep.min-available": word})
    assert min_available({"skep.min-available": word}, 3) is None
    assert min_available({}, 3) is None


def test_modes_of_mounts_are_z_by_target() -> None:
    assert relabeled({RELABEL: "/a=z, /b=c=Z"}) == {"/a": "z", "/b=c": "Z"}
    assert relabeled({}) == {}
    with pytest.raises(InvalidArgument, match="works on containers only: set it with --container-label"):
        check_service_labels({RELABEL: "/a=z"})


@pytest.mark.parametrize("text", ["/a", "a=z", "/a=x", "/a=zZ", ",", "/a=z,"])
def test_a_mode_that_is_not_z_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="expected TARGET=z or TARGET=Z, separated by commas"):
        check_container_labels({RELABEL: text})
