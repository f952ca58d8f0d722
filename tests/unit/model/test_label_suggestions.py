"""The label that is suggested for an unknown one: by its meaning first, then by its spelling."""

import pytest

from skep.model.options.label_suggestions import _SAME_MEANING, PREFIX, suggested_label
from skep.model.permissions.field_rights import CONTAINER_LABELS, SERVICE_LABELS


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("skep.schedule", "skep.cron"),
        ("skep.Schedule", "skep.cron"),
        ("skep.timezone", "skep.cron.time-zone"),
        ("skep.backoff_limit", "skep.cron.max-attempts"),
        ("skep.replicas", "skep.autoscale"),
        ("skep.sticky", "skep.publish.affinity"),
        ("skep.corn", "skep.cron"),
        ("skep.depends_on", "skep.depends-on"),
        ("skep.volume-afinity", "skep.volume-affinity"),
        ("skep.volumess", None),
        ("skep.device", None),
        ("skep.env", None),
        ("skep.zzzz", None),
    ],
)
def test_a_label_is_suggested_by_its_meaning_or_spelling(name: str, suggested: str | None) -> None:
    assert suggested_label(name, SERVICE_LABELS) == suggested


def test_only_labels_of_the_place_are_suggested() -> None:
    assert suggested_label("skep.schedule", CONTAINER_LABELS) is None
    assert suggested_label("skep.device", CONTAINER_LABELS) == "skep.devices"


def test_the_table_has_labels_that_exist_and_each_name_once() -> None:
    names = [name for names in _SAME_MEANING.values() for name in names]
    assert all(suggested_label(label, SERVICE_LABELS) == label for label in _SAME_MEANING)
    assert len(names) == len(set(names))
    assert not {f"{PREFIX}{name}" for name in names} & {*SERVICE_LABELS, *CONTAINER_LABELS}
