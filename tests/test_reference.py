"""The generated pages are those of the present code, and every setting, label and command has what its page needs."""

import ast
import re
import tomllib
from pathlib import Path

import click
import pytest

from docs.reference import generate
from skep.configuration.settings import SETTINGS, Setting
from skep.configuration.sources import Arguments, combine
from skep.model.labels import LABELS
from tests.support.sources import parsed

ROOT = Path(__file__).parents[1]
_OUR_LABEL = re.compile(r"skep(\.[a-z][a-z-]*)+\.?")
FILE_NAMES = {"skep.sock", "skep.toml", "skep.log"}


@pytest.mark.parametrize("page", generate.PAGES)
def test_a_generated_page_is_current(page: str) -> None:
    """`make reference` writes it."""
    assert (ROOT / page).read_text() == generate.PAGES[page]()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_says_how_it_is_written_and_what_it_does(setting: Setting) -> None:
    assert generate.form_of(setting)
    assert setting.help


def test_the_example_of_the_configuration_is_valid() -> None:
    text = (ROOT / "docs/reference/configuration.md").read_text()
    (example,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert combine(Arguments(), tomllib.loads(example), {}).warnings == ()


def test_every_command_shows_examples() -> None:
    silent = [
        context.command_path
        for context in generate.commands()
        if "Example" not in "\n".join(generate.help_lines(context))
    ]
    assert silent == []


def test_every_option_of_a_command_says_what_it_does() -> None:
    silent = [
        f"{context.command_path} {option.name}"
        for context in generate.commands()
        for option in context.command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert silent == []


def test_every_label_in_the_code_is_in_the_table() -> None:
    """Text of the code that looks like a label of ours; modules and commands in it are named otherwise."""
    known = [re.sub(r"\[[^]]*\]*", "", label.name).replace("NAME", "") for label in LABELS]
    found = set()
    for path in (ROOT / "skep").rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and _OUR_LABEL.fullmatch(node.value)
            ):
                found.add(node.value)
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "skep").rglob("*.py")
    }
    unknown = {
        text
        for text in found - modules - FILE_NAMES
        if text not in known and not any(name.startswith(text) for name in known if text.endswith("."))
    }
    assert unknown == set()


def test_every_event_in_the_code_is_on_its_page() -> None:
    """What is published by name, and the actions of the cluster's events."""
    published = re.compile(r"""\.(?:_?publish|announce)\(\s*f?"([a-z_]+)[":]""")
    derived = re.compile(r"""\baction="([a-z]+)"|_message\("([a-z]+)\"""")
    found = {
        match[1] for path in (ROOT / "skep").rglob("*.py") for match in published.finditer(path.read_text())
    }
    found -= {"container", "image"}  # types, of events whose action is a variable
    cluster = (ROOT / "skep/manager/events.py").read_text()
    found |= {match[1] or match[2] for match in derived.finditer(cluster)}
    assert found >= {
        "create",
        "die",
        "freeze",
        "expire",
        "evict",
        "drain",
        "pull",
        "exec_create",
        "health_status",
    }
    page = (ROOT / "docs/reference/events.md").read_text()
    assert {action for action in found if not re.search(rf"`{action}[`:]", page)} == set()
