"""Images of a stack are built, pushed where they name a registry, and else named by their content."""

from pathlib import Path

import click
import pytest

from skep.cli.stack.stack_builds import build_images
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import parse
from skep.stack.compose.reading import ProblemReport
from skep.stack.project import Stack

TEXT = """
services:
  app: {build: ./app}
  pushed: {build: {context: ./p, args: {A: b}}, image: 'r.example:5000/team/p:2'}
  named: {build: ./n, image: 'team/n:3'}
  plain: {image: busybox}
"""


def a_stack() -> Stack:
    report = ProblemReport()
    return stack_of(parse(TEXT, "f"), "shop", {}, report)


def a_docker(folder: Path, script: str = "") -> str:
    program = folder / "docker"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\n[ $2 = image ] && echo sha256:0123456789abcdef\n{script}\n'
    )
    program.chmod(0o755)
    return str(program)


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_what_is_built_is_pushed_or_named_by_its_content(tmp_path: Path) -> None:
    names = build_images((a_docker(tmp_path, "exit 0"), "-H"), a_stack(), ())
    assert names == {
        "shop-app:latest": "shop-app:build-0123456789ab",
        "team/n:3": "team/n:build-0123456789ab",
    }
    assert asked(tmp_path) == [
        "-H build --tag shop-app:latest ./app",
        "-H image inspect --format {{.Id}} shop-app:latest",
        "-H tag shop-app:latest shop-app:build-0123456789ab",
        "-H build --tag r.example:5000/team/p:2 --build-arg A=b ./p",
        "-H push r.example:5000/team/p:2",
        "-H build --tag team/n:3 ./n",
        "-H image inspect --format {{.Id}} team/n:3",
        "-H tag team/n:3 team/n:build-0123456789ab",
    ]


def test_only_the_chosen_services_are_built(tmp_path: Path) -> None:
    assert build_images((a_docker(tmp_path, "exit 0"), "-H"), a_stack(), ("pushed",)) == {}
    assert len(asked(tmp_path)) == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("build", "the image of app could not be built from ./app"),
        ("push", "r.example:5000/team/p:2 could not be pushed. Check that you are logged in"),
        ("tag", "shop-app:latest could not be named shop-app:build-0123456789ab"),
        ("image", "shop-app:latest was built, but it is missing now"),
    ],
)
def test_a_failure_ends_it_and_is_named(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(click.ClickException, match=message):
        build_images((a_docker(tmp_path, f'[ "$2" != {word} ]'), "-H"), a_stack(), ())
