"""The label by which a service says what it depends on."""

import pytest

from skep.errors import InvalidArgument
from skep.model.options.dependencies import (
    DEPENDENCIES_MAX,
    DEPENDS_ON,
    Dependency,
    DependencyCondition,
    dependencies_of,
    label_of,
    parsed_dependencies,
)


def test_what_is_written_is_read() -> None:
    given = (
        Dependency("db", DependencyCondition.HEALTHY, restarts=True),
        Dependency("log", DependencyCondition.STARTED, is_required=False),
        Dependency("migrate", DependencyCondition.COMPLETED, is_required=False, restarts=True),
    )
    label = label_of(reversed(given))
    assert label == {
        DEPENDS_ON: "db=service_healthy+restart,log=service_started+optional,"
        "migrate=service_completed_successfully+restart+optional"
    }
    assert dependencies_of(label) == given
    assert label_of(()) == {}
    assert dependencies_of({}) == ()


@pytest.mark.parametrize(
    "text",
    ["", "db", "=service_started", "db=running", "db=service_started+soon", "a=service_started,",
     "a=service_started,a=service_healthy", ",".join(f"s{n}=service_started" for n in range(DEPENDENCIES_MAX + 1))],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_and_counts_for_nothing(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"invalid label skep\.depends-on="):
        parsed_dependencies({DEPENDS_ON: text})
    assert dependencies_of({DEPENDS_ON: text}) == ()
