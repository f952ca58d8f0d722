"""Entries of ``docker history`` as BuildKit writes them.  Pure.

For a declared argument, an entry shows the default, where BuildKit shows the given value.  The entries are part of the
image that the next step starts from, so a different value in an entry would run all later steps again.

Source: buildkit, frontend/dockerfile/dockerfile2llb/convert.go (commitToHistory and its callers, runCommandString).
"""

from collections.abc import Iterable, Mapping, Sequence

from skep.engine.build.dockerfile.config import ports_of, shown_health
from skep.engine.build.dockerfile.instructions import (
    Copy,
    Expose,
    Healthcheck,
    Instruction,
    OnBuild,
    OptionLabel,
)

_WITH_FILES = " # buildkit"


def line_of_change(instruction: Instruction, line: str) -> str:
    """Return the entry of an instruction that changes the configuration.  Empty if it has none.

    ``line``: The classic builder's entry.
    """
    match instruction:
        case OnBuild() | OptionLabel():
            return ""
        case Expose(ports=ports):
            return f"EXPOSE [{' '.join(port for text in ports for port in ports_of(text))}]"
        case Healthcheck(health=health):
            return f"HEALTHCHECK {shown_health(health, has_start_interval=True)}"
    return line


def line_of_copy(copy: Copy) -> str:
    """Return the entry of COPY or ADD, with two of its options."""
    words = [copy.keyword]
    words += [f"--{name}={value}" for name, value in (("chown", copy.chown), ("chmod", copy.chmod)) if value]
    words += [*copy.sources, *(f"<<{document.name}" for document in copy.documents), copy.destination]
    return f"{' '.join(words)}{_WITH_FILES}"


def line_of_run(command: Sequence[str], declared: Iterable[str], variables: Mapping[str, str]) -> str:
    """Return the entry of RUN.

    Args:
        command: The command, with its shell.
        declared: Arguments that the stage has declared so far, in their order.
        variables: Values of the variables that the command sees.
    """
    arguments = [f"{name}={variables.get(name, '')}" for name in declared]
    count = [f"|{len(arguments)}"] if arguments else []
    return f"RUN {' '.join([*count, *arguments, *command])}{_WITH_FILES}"
