"""The generated pages are those of the present code, and every setting, label and command has what its page needs."""

import ast
import re
import tomllib
from pathlib import Path

import click
import pytest

from docs.reference import generate
from docs.reference.label_table import LABELS
from skep.aio.clock import SystemClock
from skep.configuration.settings import SETTINGS, Setting
from skep.configuration.sources import Arguments, combine
from skep.manager.telemetry.events import messages_of
from skep.model.network import Network
from skep.model.node import Node
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.volume import Volume
from skep.store.interface import Created
from skep.store.memory import MemoryStore
from tests.support.harness.sources import parsed

ROOT = Path(__file__).parents[1]
_OUR_LABEL = re.compile(r"skep(\.[a-z][a-z-]*)+\.?")
FILE_NAMES = {"skep.sock", "skep.toml", "skep.log"}
FORMER = {"skep.allow-helpers", "skep.volumes"}
"""Labels of earlier versions, which are still read: `docs/reference/renamed.md`."""


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
        if isinstance(option, click.Option) and not option.hidden and not option.help
    ]
    assert silent == []


ACTIONS = {
    " ".join(filter(None, ("skep", noun, verb)))
    for noun, verbs in {
        "": "daemon exec attach balance cp port-forward register run backup restore up upgrade",
        "playground": "add cut demo down env exec kill load reconnect pause resume start up",
        "cluster": "recover resume rotate-keys unfreeze",
        "reboot-lock": "release take",
        "node": "drain evict forget",
        "door": "acme down up",
        "catalog": "serve",
        "service": "expose hide rollback start stop wait",
        "update": "abort pause promote resume switch-back",
        "network": "update",
        "volume": "forget",
        "fleet": "start stop",
        "job": "retry run",
        "stack quota": "set rm",
        "user": "add renew rm token update",
        "notify": "add rm test",
        "certificate": "renew",
        "secret": "prune rotate",
        "config": "prune rotate",
        "stack": "deploy rm rollback start stop unfreeze",
        "context": "create rm use",
    }.items()
    for verb in verbs.split()
}
"""What does something.  A line or two say that it is done."""
FILES = {
    "skep stack config",
    "skep import fig",
    "skep import fleet",
    "skep import service",
    "skep import swarm",
    "skep completion",
    "skep context show",
}
"""What writes a file, or a word for a script."""
DOCKERS_OR_FULL_SCREEN = {
    "skep fleet journal",
    "skep logs",
    "skep stats",
    "skep task top",
    "skep top",
    "skep ui",
}
AS_IT_HAPPENS = {"skep events"}


def test_every_command_that_shows_something_has_the_same_options_for_it() -> None:
    """A new command has them, or is in one of the lists above."""
    offers = {
        context.command_path: {option for each in context.command.params for option in each.opts}
        for context in generate.commands()
        if not isinstance(context.command, click.Group)
    }
    others = ACTIONS | FILES | DOCKERS_OR_FULL_SCREEN
    assert others <= set(offers), "no such commands"
    forms, watch = {"-o", "--output", "--format"}, {"-w", "--watch"}
    assert [path for path in offers if path not in others and not forms <= offers[path]] == []
    watched = {path for path in offers if path not in others and watch <= offers[path]}
    assert set(offers) - others - watched == AS_IT_HAPPENS
    assert [path for path in others if {"--format", "--watch"} & offers[path]] == [], "they show something"


def test_every_exit_code_is_of_a_command() -> None:
    known = {context.command_path for context in generate.commands()}
    named = {command.removesuffix(" --all") for _, command, _ in generate.EXIT_CODES if command}
    assert named - known == {"skep service ls"}


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
        for text in found - modules - FILE_NAMES - FORMER
        if text not in known and not any(name.startswith(text) for name in known if text.endswith("."))
    }
    assert unknown == set()


def test_every_event_of_the_cluster_is_described() -> None:
    described = {action for event in generate.CLUSTER_EVENTS for action in event.actions}
    assert described == generate.cluster_actions()
    functions = {name for event in generate.CLUSTER_EVENTS for name in event.derived}
    with_attributes = {name for name, attributes in generate.cluster_attributes().items() if attributes}
    assert functions == with_attributes


def test_the_types_of_the_clusters_events_are_those_of_its_objects() -> None:
    """Of created objects.  A removed service gives its event while it still has tasks, before it is deleted."""
    kinds = (Service, Task, Node, Secret, Config, Network, Swarm, Volume)
    view = MemoryStore(SystemClock()).view()
    of_created = {
        (message.type, message.action)
        for kind in kinds
        for message in messages_of(Created(kind(id="i", created_at="2023-11-14T22:13:20Z")), 0, view)
    }
    described = {
        (type, action)
        for event in generate.CLUSTER_EVENTS
        for type in event.types
        for action in event.actions
    }
    assert of_created == {(type, action) for type, action in described if action == "create"}


def test_every_event_of_containers_and_images_is_described() -> None:
    found = generate.container_attributes()
    assert set(found) == set(generate.CONTAINER_EVENTS)
    assert found["die"] == {"exitCode"}
    assert found["exec_create"] == {"execID"}
    assert generate.image_actions() >= {"delete", "load", "pull", "save", "tag", "untag"}
