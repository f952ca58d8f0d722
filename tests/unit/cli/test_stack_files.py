"""Which files make a stack, and what `skep stack config` prints of them; no cluster is needed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from skep.cli.main import main

TEXT = "services: {web: {image: 'w:${V:-1}', develop: {}}, extra: {image: e, profiles: [more]}}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present directory, with a file."""
    for name in ("COMPOSE_FILE", "COMPOSE_PATH_SEPARATOR", "COMPOSE_PROFILES", "NO_COLOR", "V"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compose.yaml").write_text(TEXT)
    return tmp_path


def config(*words: str, given: str = "", color: bool = False, **environment: str) -> Any:
    runner = CliRunner()
    return runner.invoke(main, ["stack", "config", *words], input=given, env=environment, color=color)


def images(*words: str, given: str = "", **environment: str) -> dict[str, str]:
    """By service, as in the merged file."""
    done = config(*words, given=given, **environment)
    assert done.exit_code == 0, done.output
    return {name: one["image"] for name, one in yaml.safe_load(done.stdout)["services"].items()}


def test_the_file_here_is_printed_with_its_variables_and_chosen_profiles(folder: Path) -> None:
    assert images() == {"web": "w:1"}
    assert images(V="2") == {"web": "w:2"}
    assert images("--profile", "more") == images(COMPOSE_PROFILES="x,more") == {"web": "w:1", "extra": "e"}
    (folder / "vars").write_text("V=3\n")
    assert images("--env-file", "vars") == {"web": "w:3"}
    assert config("--services").stdout == "web\n"
    assert config("--quiet").stdout == ""


def test_files_are_named_by_options_the_environment_or_their_usual_names(folder: Path) -> None:
    (folder / "more.yml").write_text("services: {db: {image: d}}\n")
    both = {"web": "w:1", "db": "d"}
    assert images("-c", "compose.yaml", "-c", "more.yml") == both
    assert images(COMPOSE_FILE="compose.yaml:more.yml") == both
    assert images(COMPOSE_FILE="compose.yaml,more.yml", COMPOSE_PATH_SEPARATOR=",") == both
    assert images("-c", "-", given="services: {a: {image: s}}") == {"a": "s"}
    (folder / "compose.yaml").unlink()
    none = config()
    assert (none.exit_code, none.output) == (1, "Error: there is no compose.yaml here: name a file with -c\n")
    (folder / "more.yml").rename(folder / "docker-compose.yml")
    assert images() == {"db": "d"}


def test_relative_paths_begin_at_the_directory_of_the_project(folder: Path) -> None:
    (folder / "compose.yaml").write_text("services: {w: {image: w, volumes: ['./d:/d']}}")
    for words, place in (((), folder), (("--project-directory", "/srv"), Path("/srv"))):
        found = yaml.safe_load(config(*words).stdout)["services"]["w"]["volumes"]
        assert found == [f"{place}/d:/d"]


def test_what_has_no_effect_is_warned_of_and_no_color_is_honoured(folder: Path) -> None:
    said = "services.web.develop: it concerns `docker compose watch`"
    coloured, plain = config(color=True), config(color=True, NO_COLOR="1")
    assert "\x1b[33mwarning" in coloured.stderr
    assert plain.stderr == f"warning: {folder}/compose.yaml:1:47: {said}\n"


def test_wrong_files_are_an_error_with_the_place(folder: Path) -> None:
    (folder / "compose.yaml").write_text("services:\n  web: {imag: w}\n")
    done = config("--quiet")
    assert done.exit_code == 1
    assert (
        f"{folder}/compose.yaml:2:9: services.web.imag: this key is not known: did you mean image?"
        in done.output
    )


def test_all_or_nothing_waits_for_the_whole_stack(folder: Path) -> None:
    for option in ("--detach", "--only=web"):
        words = ["--host", "unix:///nowhere", "stack", "deploy", "--rollback-on-failure", option, "shop"]
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, "waits for the whole stack" in done.output) == (2, True)
