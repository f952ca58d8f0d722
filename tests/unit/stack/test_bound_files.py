"""Files that services mount: their content is in a label, so that a change updates the service."""

from pathlib import Path

from skep.model.options.labels import STACK_FILES
from skep.stack.compose.bound_files import with_bound_files
from skep.stack.compose.reading import ProblemReport
from skep.stack.planning import Existing, PlanAction, StackPlan, plan_of
from tests.unit.stack.test_planning import a_stack, deployed


def files(folder: Path, *mounts: str) -> str:
    stack = with_bound_files(a_stack(text(*mounts)), folder, ProblemReport())
    container = stack.services["web"].spec.task_template.container_spec
    assert container is not None
    return container.labels.get(STACK_FILES, "")


def text(*mounts: str) -> str:
    return f"services: {{web: {{image: w, volumes: [{', '.join(f'{one}' for one in mounts)}]}}}}"


def test_only_files_beside_the_stack_count(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    (folder / "conf").mkdir(parents=True)
    (folder / "conf/a").write_text("one")
    (tmp_path / "else").write_text("x")
    found = files(
        folder, f"{folder}/conf/a:/a", f"{folder}/conf:/b", f"{tmp_path}/else:/c", f"{folder}/gone:/d"
    )
    assert found.partition("=")[0] == "conf/a"
    assert "," not in found
    assert files(folder, f"{folder}/conf:/b") == ""
    (folder / "conf/a").write_text("two")
    assert files(folder, f"{folder}/conf/a:/a") != found


def test_changed_content_replaces_the_tasks_and_the_plan_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_text("one")
    mounts = text(f"{tmp_path}/a.conf:/a")

    def plan(existing: Existing) -> StackPlan:
        return plan_of(
            with_bound_files(a_stack(mounts), tmp_path, ProblemReport()), existing, images={}, prune=False
        )

    before = deployed(with_bound_files(a_stack(mounts), tmp_path, ProblemReport()))
    assert not plan(before).effective
    (tmp_path / "a.conf").write_text("two")
    (change,) = plan(before).of("service", PlanAction.UPDATE)
    assert change.restarts
    (difference,) = change.differences
    assert difference.path == f"TaskTemplate.ContainerSpec.Labels.{STACK_FILES}"
    assert difference.before.startswith("a.conf=")
    assert difference.after.startswith("a.conf=")


def test_a_file_that_is_not_followed_is_named(tmp_path: Path) -> None:
    for number in range(51):
        (tmp_path / f"{number:02}").write_text("x")
    (tmp_path / "00").write_bytes(b"x" * ((8 << 20) + 1))
    report = ProblemReport()
    mounts = [f"{tmp_path}/{number:02}:/{number}" for number in range(51)]
    with_bound_files(a_stack(text(*mounts)), tmp_path, report)
    assert [(one.path, one.text) for one in report.warnings] == [
        ("services.web.volumes", f"a change of {tmp_path}/00 updates nothing: it is larger than 8 MiB"),
        (
            "services.web.volumes",
            f"a change of {tmp_path}/50 updates nothing: the service mounts more than 50 files",
        ),
    ]
