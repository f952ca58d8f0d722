"""Supported versions of programs, and the errors for others."""

import pytest

from skep.node.host.requirements import CONMON, CRUN, NFT, RUNC, Tool, tool_problem, version_in


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1\nspec: 1.0.2-dev", (1, 1, 5)),
        ("conmon version 2.1.6\ncommit: unknown\n", (2, 1, 6)),
        ("nftables v1.0.6 (Lester Gooch #5)\n", (1, 0, 6)),
        ("crun version 1.14", (1, 14)),
        ("no idea", None),
    ],
)
def test_a_version_is_found_in_what_a_program_says(output: str, version: tuple[int, ...] | None) -> None:
    assert version_in(output) == version


@pytest.mark.parametrize(
    ("tool", "program", "output", "sentence"),
    [
        (
            RUNC,
            "runc",
            None,
            "runc is missing or cannot be run: apt-get install runc, or name it with --runc",
        ),
        (
            CONMON,
            "/opt/conmon",
            "hello",
            "/opt/conmon does not print its version: name another conmon with --conmon",
        ),
        (NFT, "nft", "nftables v0.9.8 (E.D.S.)", "nft 0.9.8 is too old, skep needs 1.0.0 or newer"),
        (RUNC, "runc", "runc version 1.0.3", "runc 1.0.3 is too old, skep needs 1.1.0 or newer"),
        (RUNC, "runc", "runc version 1.1.0", ""),
        (
            RUNC,
            "/usr/bin/crun",
            "crun version 1.8.1\ncommit: f8a096be",
            "/usr/bin/crun is crun: name it with --crun, and runc with --runc",
        ),
        (CRUN, "runc", "runc version 1.1.5", "runc is runc: name it with --runc, and crun with --crun"),
        (RUNC, "nvidia-container-runtime", "NVIDIA version 1.17\n\nrunc version 1.1.12\n", ""),
    ],
)
def test_a_program_that_will_not_do_is_refused_with_what_to_do(
    tool: Tool, program: str, output: str | None, sentence: str
) -> None:
    problem = tool_problem(tool, program, output)
    assert problem.startswith(sentence)
    assert bool(problem) is bool(sentence)
