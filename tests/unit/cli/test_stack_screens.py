"""What the commands of stacks print."""

import pytest
from click import unstyle
from msgspec.structs import replace

from skep.cli.stack.stack_screens import ProgressPrinter, line_of, lines_of, shortened
from skep.model.service import UpdateState, UpdateStatus
from skep.stack.differences import Difference
from skep.stack.planning import plan_of
from tests.unit.stack.test_planning import a_stack, deployed

LONG = "sh -c test -s /run/secrets/dbpass && date >> /data/boots && exec nc -l -p 5432 -e /bin/serve --level "


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("a", "b", ("a", "b")),
        ("", "b" * 100, ("", "b" * 60 + "...")),
        ("a" * 70, "b" * 70, ("a" * 60 + "...", "b" * 60 + "...")),
        (LONG + "1", LONG + "22", ("... /bin/serve --level 1", "... /bin/serve --level 22")),
        ("x" * 40 + LONG, "x" * 40, ("..." + ("x" * 40 + LONG)[20:80] + "...", "..." + "x" * 20)),
    ],
)
def test_long_values_are_cut_around_their_first_difference(
    before: str, after: str, shown: tuple[str, str]
) -> None:
    assert shortened(before, after) == shown


def test_a_wide_screen_has_the_values_whole() -> None:
    one = Difference("TaskTemplate.ContainerSpec.Args", LONG + "1", LONG + "2\n")
    assert line_of(one, is_wide=True) == f"Args: {LONG}1 -> {LONG}2\\n"
    assert line_of(one).startswith("Args: ...")


@pytest.mark.parametrize(
    ("path", "before", "after", "shown"),
    [
        ("TaskTemplate.ContainerSpec.Healthcheck.Interval", "", "1500000000", "(unset) -> 1500ms"),
        ("TaskTemplate.Resources.Limits.MemoryBytes", "8388608", "16777216", "8 MiB -> 16 MiB"),
        ("TaskTemplate.Resources.Limits.NanoCPUs", "500000000", "2000000000", "0.5 CPUs -> 2 CPUs"),
        ("Mode.Replicated.Replicas", "2", "6", "2 -> 6"),
        ("Labels.Interval", "soon", "1s", "soon -> 1s"),
    ],
)
def test_values_have_their_unit(path: str, before: str, after: str, shown: str) -> None:
    assert line_of(Difference(path, before, after)).endswith(f": {shown}")


@pytest.mark.parametrize(("mode", "is_warned"), [("host", True), ("ingress", False)])
def test_a_plan_says_where_start_first_cannot_be_kept(mode: str, is_warned: bool) -> None:
    text = (
        "services: {w: {image: %s, ports: [{target: 80, published: 8080, mode: %s}], "
        "deploy: {update_config: {order: start-first}}}}"
    )
    plan = plan_of(a_stack(text % ("b", mode)), deployed(a_stack(text % ("a", mode))), images={}, prune=False)
    shown = "\n".join(lines_of(plan))
    assert "starting new tasks first" in shown
    assert ("or stopping old ones if no other node has a free host port" in shown) is is_warned


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        ("{skep.update: blue-green}", "starting all new tasks, which get connections once all run"),
        (
            "{skep.update: blue-green, skep.update.promote: manual}",
            "starting all new tasks, which get connections at skep update promote shop_w",
        ),
        ("{skep.update: canary}", "in steps of new connections (5 %, 25 %)"),
        (
            "{skep.update: canary, skep.update.steps: 10%, skep.update.promote: manual}",
            "in steps of new connections (10 %), each until skep update promote shop_w",
        ),
    ],
)
def test_a_plan_names_the_steps_of_a_staged_update(labels: str, how: str) -> None:
    text = "services: {w: {image: %s, deploy: {labels: " + labels.replace("%", "%%") + "}}}"
    plan = plan_of(a_stack(text % "b"), deployed(a_stack(text % "a")), images={}, prune=False)
    assert f"replaces tasks, {how}, because of Image" in "\n".join(lines_of(plan))


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ("{}", "stops its last run, and starts a new one"),
        ("{skep.cron: '@daily'}", "applies from its next run on"),
    ],
)
@pytest.mark.parametrize("change", ["image: b", "image: a, stop_signal: SIGINT"])
def test_a_plan_says_that_a_changed_job_runs_again(labels: str, what: str, change: str) -> None:
    """A job has no rolling update.  Its tasks start at once, whatever has changed."""
    text = "services: {w: {%s, deploy: {mode: global-job, labels: " + labels.replace("%", "%%") + "}}}"
    plan = plan_of(a_stack(text % change), deployed(a_stack(text % "image: a")), images={}, prune=False)
    (_, line, _) = map(unstyle, lines_of(plan))
    assert line == f"  ~ service shop_w   {what}"


@pytest.mark.parametrize(("state", "is_kept"), [("updating", True), ("paused", True), ("completed", False)])
def test_the_plan_of_the_old_file_during_a_staged_update_says_that_old_tasks_stay(
    state: str, is_kept: bool
) -> None:
    text = "services: {w: {image: %s, deploy: {labels: {skep.update: blue-green}}}}"
    old, now = deployed(a_stack(text % "a:1")), deployed(a_stack(text % "b"))
    status = UpdateStatus(state=UpdateState(state))
    services = [
        replace(one, previous_spec=before.spec, update_status=status)
        for one, before in zip(now.services, old.services, strict=True)
    ]
    updating = replace(now, services=services)
    shown = "\n".join(lines_of(plan_of(a_stack(text % "a:1"), updating, images={}, prune=False)))
    assert (
        "ends its update: old tasks stay, and new ones are replaced, because of Image" in shown
    ) is is_kept
    assert ("starting all new tasks" in shown) is not is_kept
    other = "\n".join(lines_of(plan_of(a_stack(text % "c"), updating, images={}, prune=False)))
    assert "starting all new tasks" in other


def test_progress_is_printed_when_it_changes_and_not_again(capsys: pytest.CaptureFixture[str]) -> None:
    printer = ProgressPrinter()
    for text in ("0 of 2 tasks run", "0 of 2 tasks run", "1 of 2 tasks run", "1 of 2 tasks run"):
        for name in ("web", "db"):
            printer.show(name, text)
    assert capsys.readouterr().err.splitlines() == [
        "web: 0 of 2 tasks run",
        "db: 0 of 2 tasks run",
        "web: 1 of 2 tasks run",
        "db: 1 of 2 tasks run",
    ]
