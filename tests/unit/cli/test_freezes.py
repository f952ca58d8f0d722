"""``skep cluster freeze`` and ``window``: what the commands refuse and show, and what waits for the end of a freeze."""

from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from skep.cli.cluster.freezes import shown_freezes, shown_window, strict_freezes
from skep.cli.main import main
from skep.cli.maintain.maintenance import require_unfrozen
from skep.errors import FailedPrecondition
from skep.model.options.freezes import ChangeFreeze, FreezesResponse, MaintenanceWindow
from skep.model.values.times import Timestamp
from tests.support.managers.upgraded_clusters import UpgradedCluster

FREEZE = ChangeFreeze(until=Timestamp("2026-12-27T05:00:00Z"), by="alice", reason="holidays", is_strict=True)
WINDOW = {"Cron": "0 2 * * *", "Length": 3600 * 10**9, "ClosedUntil": "2026-12-28T02:00:00Z"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("cluster freeze --reason holidays", "a freeze needs an end"),
        ("cluster freeze --strict", "a freeze needs an end"),
        ("stack freeze shop --for 2h --until 18:00", "--for and --until cannot be used together"),
        (
            "stack freeze shop --until whenever",
            "invalid time 'whenever'. Use '18:00', '2026-12-27 06:00' or 2026-12-27T",
        ),
        ("cluster window --for 2h", "a window needs CRON and --for DURATION"),
        ("cluster window @daily", "a window needs CRON and --for DURATION"),
        ("cluster window --remove --for 2h", "--remove takes no window"),
        ("stack window shop --for 2h", "a window needs CRON and --for DURATION"),
        ("stack window shop @daily --remove", "--remove takes no window"),
    ],
)
def test_a_freeze_without_an_end_is_refused_before_any_request(words: str, why: str) -> None:
    done = CliRunner().invoke(main, ["--host", "unix:///nowhere", *words.split()])
    assert done.exit_code == 2
    assert why in done.output


def test_freezes_are_listed_with_their_reasons() -> None:
    found = {"": FREEZE, "shop": FREEZE}
    assert list(shown_freezes(found).lines(None)) == [  # type: ignore[arg-type]
        "the cluster is frozen until 2026-12-27 05:00 UTC by alice: holidays (strict)",
        "stack shop is frozen until 2026-12-27 05:00 UTC by alice: holidays (strict)",
    ]
    assert list(shown_freezes(found, "blog").lines(None)) == ["Stack blog is not frozen."]  # type: ignore[arg-type]


def test_a_stacks_window_is_shown_by_its_name() -> None:
    window = MaintenanceWindow(
        cron="0 2 * * *", length=3600 * 10**9, closed_until=Timestamp("2026-12-28T02:00:00Z")
    )
    found = FreezesResponse(stack_windows={"shop": window, "blog": replace(window, closed_until="")})

    def line(stack: str) -> str:
        return "".join(shown_window(found, stack).lines(None))  # type: ignore[arg-type]

    times = "0 2 * * * (UTC), for 60 minutes; the maintenance window of stack"
    assert line("shop") == f"{times} shop is closed until 2026-12-28 02:00 UTC"
    assert line("blog") == f"{times} blog is open"
    assert line("mail") == "Stack mail has no window of its own."
    assert line("") == "No window: Skep may act at any time."


def test_windows_that_never_meet_are_named_with_the_clusters_window_and_the_stacks() -> None:
    night, noon = (MaintenanceWindow(cron=f"0 {hour} * * *", length=3600 * 10**9) for hour in (2, 12))
    found = FreezesResponse(window=night, stack_windows={"shop": noon, "blog": night})

    def warnings(stack: str) -> list[str]:
        return list(shown_window(found, stack).lines(None))[1:]  # type: ignore[arg-type]

    (warning,) = warnings("")
    assert warning.startswith(
        "WARNING: the windows of the cluster and of stack shop are never open at the same"
    )
    assert (warnings("shop"), warnings("blog")) == ([warning], [])


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, ""),
        ({"StackWindows": {"shop": WINDOW}}, ""),
        ({"Freezes": {"shop": {}}}, ""),
        (
            {"Freezes": {"": {"Until": "2026-12-27T05:00:00Z"}}},
            "the cluster is frozen until 2026-12-27 05:00 UTC",
        ),
        ({"Window": WINDOW}, "the maintenance window is closed until 2026-12-28 02:00 UTC"),
        ({"Window": {**WINDOW, "ClosedUntil": ""}}, ""),
    ],
)
async def test_maintenance_waits_for_the_end_of_the_clusters_freeze(found: dict[str, Any], why: str) -> None:
    cluster = UpgradedCluster("m1", version="1.0.0")
    cluster.freezes = found
    if not why:
        return await require_unfrozen(cluster)
    with pytest.raises(FailedPrecondition, match=why):
        await require_unfrozen(cluster)
    return None


async def test_a_plan_warns_of_strict_freezes_of_the_cluster_and_of_its_stack() -> None:
    cluster = UpgradedCluster("m1", version="1.0.0")
    strict = {"Until": "2026-12-27T05:00:00Z", "By": "alice", "IsStrict": True}
    cluster.freezes = {"Freezes": {"": strict, "shop": {**strict, "IsStrict": False}, "blog": strict}}
    words = (
        "the cluster is frozen until 2026-12-27 05:00 UTC by alice: the managers refuse a deploy until then"
    )
    assert await strict_freezes(cluster, "shop") == [words]
    assert len(await strict_freezes(cluster, "blog")) == 2
    cluster.freezes = {}
    assert await strict_freezes(cluster, "shop") == []
