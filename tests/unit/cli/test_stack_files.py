"""Which files make a stack, and what `skep stack config` prints of them; no cluster is needed."""

import json
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
    assert (none.exit_code, none.output) == (
        1,
        "Error: There is no compose.yaml in this directory. Specify a file with -c.\n",
    )
    (folder / "more.yml").rename(folder / "docker-compose.yml")
    assert images() == {"db": "d"}


def test_relative_paths_begin_at_the_directory_of_the_project(folder: Path) -> None:
    (folder / "compose.yaml").write_text("services: {w: {image: w, volumes: ['./d:/d']}}")
    for words, place in (((), folder), (("--project-directory", "/srv"), Path("/srv"))):
        found = yaml.safe_load(config(*words).stdout)["services"]["w"]["volumes"]
        assert found == [f"{place}/d:/d"]


def test_what_has_no_effect_is_warned_of_and_no_color_is_honored(folder: Path) -> None:
    said = "services.web.develop: it only affects `docker compose watch`"
    colored, plain = config(color=True), config(color=True, NO_COLOR="1")
    assert "\x1b[33mWarning" in colored.stderr
    assert plain.stderr == f"Warning: {folder}/compose.yaml:1:47: {said}\n"


def test_wrong_files_are_an_error_with_the_place(folder: Path) -> None:
    (folder / "compose.yaml").write_text("services:\n  web: {imag: w}\n")
    done = config("--quiet")
    assert done.exit_code == 1
    assert f"{folder}/compose.yaml:2:9: services.web.imag: unknown key: did you mean image?" in done.output


def test_all_or_nothing_waits_for_the_whole_stack(folder: Path) -> None:
    for option in ("--detach", "--only=web"):
        words = ["--host", "unix:///nowhere", "stack", "deploy", "--rollback-on-failure", option, "shop"]
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, "cannot be used with --detach or --only" in done.output) == (2, True)


DOLLARS = """
services:
  web:
    image: busybox:1
    command: ["sh", "-c", "echo $$HOME $${NOT:-1} a$$$$b ${V}"]
    environment: {PRICE: "$$5", BOTH: "${V}$$V", PLAIN: $$x}
    healthcheck: {test: "test -n $$HOSTNAME"}
configs: {c: {content: "one\\ntwo $$three\\n"}}
"""


def test_what_is_printed_is_read_again_as_the_same_dollars_too(folder: Path) -> None:
    (folder / "compose.yaml").write_text(DOLLARS)
    once = config(V="$v").stdout
    assert "PRICE: $$5" in once
    assert "BOTH: $$v$$V" in once, "the value of a variable has a dollar sign, which is no variable"
    assert "a$$$$b" in once
    assert config("-c", "-", given=once, V="other").stdout == once


LIKE_NUMBERS = ("0o10", "010", "1e3", "1_000", "22:22", "2001-01-01", "0x1f", "1.10", ".5", "+1")
LIKE_WORDS = ("on", "yes", "No", "null", "~", "", "true", "=", "<<")
LIKE_YAML = (
    "- a",
    "a: b",
    "#x",
    "'",
    '"',
    "*a",
    "&a",
    "!reset",
    "-",
    "?",
    "{",
    "[",
    ",",
    "%",
    "@",
    "`",
    "|",
    ">",
    "$",
)
LONG = (" a ", "a\nb\n", "a\n\n  b", "\ttab", "\x7f", "a" * 300 + " b")


@pytest.mark.parametrize("text", [*LIKE_NUMBERS, *LIKE_WORDS, *LIKE_YAML, *LONG])
def test_any_text_survives_printing(folder: Path, text: str) -> None:
    document = {"services": {"web": {"image": "w", "environment": {"T": text.replace("$", "$$")}}}}
    (folder / "compose.yaml").write_text(json.dumps(document))
    once = config().stdout
    (folder / "compose.yaml").write_text(once)
    assert config().stdout == once
    found = yaml.safe_load(once)["services"]["web"]["environment"]["T"]
    assert found == text.replace("$", "$$"), "readers of YAML 1.1 see the same text"


def test_numbers_and_booleans_keep_their_form(folder: Path) -> None:
    """``1.10`` is a version, and no 1.1; 0440 is a mode."""
    (folder / "compose.yaml").write_text(
        "services: {web: {image: w, init: true, environment: {V: 1.10, N: null}, configs: [{source: c, mode: 0440}]}}\n"
        "configs: {c: {content: x}}"
    )
    lines = config().stdout.splitlines()
    for line in ("    init: true", "      V: 1.10", "      mode: 0440"):
        assert line in lines or line.replace("      mode", "      - mode") in lines or f"  {line}" in lines, (
            lines
        )
