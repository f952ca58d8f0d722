"""Entries of ``docker history``, as BuildKit 0.25 in Docker Engine 28.5 wrote them."""

import pytest

from skep.engine.build.dockerfile.config import (
    begun,
    changed,
    expanded,
    line_of_change,
    line_of_copy,
    line_of_run,
)
from skep.engine.build.dockerfile.dockerfile import parse
from skep.engine.build.dockerfile.instructions import Copy, Instruction, instruction_of
from skep.engine.images.image import ContainerDefaults

VARIABLES = {"U": "7", "S": "src"}


def instruction(text: str) -> Instruction:
    return expanded(instruction_of(parse(text).lines[0]), VARIABLES, "\\")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("EXPOSE 80-82 53/udp 7/TCP", "EXPOSE [53/udp 7/tcp 80/tcp 81/tcp 82/tcp]"),
        ("EXPOSE $N", "EXPOSE []"),
        (
            "HEALTHCHECK --interval=1m --start-interval=2s CMD a",
            'HEALTHCHECK &{["CMD-SHELL" "a"] "1m0s" "0s" "0s" "2s" \'\\x00\'}',
        ),
        ("ONBUILD RUN x", ""),
        ("ENV A=$U", "ENV A=7"),
        ("VOLUME /a /b", "VOLUME [/a /b]"),
        ("ARG A=1 B", "ARG A=1 B"),
    ],
)
def test_an_instruction_of_the_configuration(text: str, line: str) -> None:
    found = instruction(text)
    assert line_of_change(found, changed(begun(ContainerDefaults()), found)[1]) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("COPY ${S}/a /d/", "COPY src/a /d/"),
        ('COPY ["a b", "/d e/"]', "COPY a b /d e/"),
        ("COPY --from=s --link --exclude=x /x /y", "COPY /x /y"),
        ("COPY --chmod=6$U$U --chown=$U:${U}0 a /a", "COPY --chown=7:70 --chmod=677 a /a"),
        ('COPY <<a <<"b" c /d/\nA\na\nB\nb', "COPY c <<a <<b /d/"),
        ("ADD --keep-git-dir=true a /x", "ADD a /x"),
    ],
)
def test_a_copy(text: str, line: str) -> None:
    found = instruction(text)
    assert isinstance(found, Copy)
    assert line_of_copy(found) == f"{line} # buildkit"


def test_a_command_shows_the_arguments_in_the_order_of_their_declaration() -> None:
    command = ("/bin/sh", "-c", "x")
    assert line_of_run(command, (), VARIABLES) == "RUN /bin/sh -c x # buildkit"
    line = line_of_run(command, ("U", "N", "A"), {**VARIABLES, "A": "1"})
    assert line == "RUN |3 U=7 N= A=1 /bin/sh -c x # buildkit"
