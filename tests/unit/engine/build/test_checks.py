"""Build checks: BuildKit's names, texts and lines."""

from collections.abc import Sequence

import pytest

from skep.engine.build.dockerfile.checks import Checks, CheckSelection, Finding, parse_choice, suggested
from skep.engine.build.dockerfile.dockerfile import parse
from skep.engine.build.dockerfile.instructions import stages_of
from skep.engine.build.dockerfile.targets import automatic_arguments
from skep.errors import InvalidArgument


def found(text: str, needed: Sequence[int] | None = None, choice: str = "") -> list[str]:
    """What the checks say of a Dockerfile on an image with PATH, as a real BuildKit shows it in a build."""
    parsed = parse(text)
    stages = stages_of(parsed)

    def env_of(name: str) -> tuple[str, ...] | None:
        return ("PATH=/bin",) if name == "busybox:1" else None

    checks = Checks(
        parsed, stages, {}, automatic_arguments(stages, ""), env_of, parse_choice(choice or parsed.check)
    )
    findings = checks.run(range(len(stages.stages)) if needed is None else needed)
    return [one.summary for one in findings]


NAMES = """FROM busybox:1 as Build
MAINTAINER me
ENV a b
ARG MY_TOKEN
RUN echo $x
CMD a
CMD b
env q=1
FROM busybox:1 AS build
EXPOSE 127.0.0.1:80:80/TCP
WORKDIR x
ENTRYPOINT x
FROM --platform=linux/amd64 $foo:1 AS scratch
RUN a \\

 b
"""
VARIABLES = """ARG GLOBL=x
FROM busybox:1 AS a
ENV a=${foo:-bar} b=${foo+x} c=$PTH
LABEL d=$GLOBL
ARG FOO
ENV e=$FOO f=$TARGETARCH
SHELL ["/bin/sh", "-c"]
CMD x
RUN echo $nope
COPY $zz /zz/
ENV MY_KEY=1 KEY_FILE=2 PUBLIC_KEY=3
# check=skip=SecretsUsedInArgOrEnv
ENV AUTH=1
LABEL x y
EXPOSE 80/TCP 1:2
FROM a
ENTRYPOINT z
FROM busybox:1 AS unused
ENV z=$unused
"""


def test_names_and_forms_are_checked_as_by_buildkit() -> None:
    assert found(NAMES) == [
        "NoEmptyContinuation: Empty continuation line (line 16)",
        "StageNameCasing: Stage name 'Build' should be lowercase (line 1)",
        "FromAsCasing: 'as' and 'FROM' keywords' casing do not match (line 1)",
        "MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label (line 2)",
        'DuplicateStageName: Duplicate stage name "build", stage names should be unique (line 9)',
        'ReservedStageName: Stage name should not use the same name as reserved stage "scratch" (line 13)',
        "ConsistentInstructionCasing: Command 'env' should match the case of the command majority (uppercase) (line 8)",
        "InvalidDefaultArgInFrom: Default value for ARG $foo:1 results in empty or invalid base image name (line 13)",
        "UndefinedArgInFrom: FROM argument 'foo' is not declared (line 13)",
        'FromPlatformFlagConstDisallowed: FROM --platform flag should not use constant value "linux/amd64" (line 13)',
        'LegacyKeyValueFormat: "ENV key=value" should be used instead of legacy "ENV key value" format (line 3)',
        'SecretsUsedInArgOrEnv: Do not use ARG or ENV instructions for sensitive data (ARG "MY_TOKEN") (line 4)',
        "JSONArgsRecommended: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals (line 6)",
        "JSONArgsRecommended: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals (line 7)",
        "MultipleInstructionsDisallowed: Multiple CMD instructions should not be used in the same stage because only the last one will be used (line 6)",
        "ExposeProtoCasing: Defined protocol '127.0.0.1:80:80/TCP' in EXPOSE instruction should be lowercase (line 10)",
        "ExposeInvalidFormat: EXPOSE instruction should not define an IP address or host-port mapping, found '127.0.0.1:80:80/TCP' (line 10)",
        'WorkdirRelativePath: Relative workdir "x" can have unexpected results if the base image changes (line 11)',
        "JSONArgsRecommended: JSON arguments recommended for ENTRYPOINT to prevent unintended behavior related to OS signals (line 12)",
    ]


def test_variables_without_a_value_are_named_with_what_was_probably_meant() -> None:
    variables = [one for one in found(VARIABLES, [0]) if one.startswith("UndefinedVar")]
    assert variables == [
        "UndefinedVar: Usage of undefined variable '$foo' (line 3)",
        "UndefinedVar: Usage of undefined variable '$foo' (line 3)",
        "UndefinedVar: Usage of undefined variable '$PTH' (did you mean $PATH?) (line 3)",
        "UndefinedVar: Usage of undefined variable '$GLOBL' (line 4)",
        "UndefinedVar: Usage of undefined variable '$TARGETARCH' (line 6)",
        "UndefinedVar: Usage of undefined variable '$zz' (did you mean $a?) (line 10)",
    ]


def test_a_stage_that_is_not_needed_and_an_image_that_is_not_here_are_not_looked_at() -> None:
    assert not [one for one in found(VARIABLES, [0]) if "unused" in one]
    assert [one for one in found(VARIABLES) if "unused" in one]
    assert found("FROM nosuch\nENV a=$OF_THE_IMAGE\n") == []


def test_an_instruction_chooses_its_checks_by_the_comment_before_it() -> None:
    secrets = [one for one in found(VARIABLES, [0]) if one.startswith("Secrets")]
    assert secrets == [
        'SecretsUsedInArgOrEnv: Do not use ARG or ENV instructions for sensitive data (ENV "MY_KEY") (line 11)'
    ]


def test_a_shell_of_its_own_makes_text_commands_deliberate() -> None:
    assert not [one for one in found(VARIABLES) if one.startswith("JSON")]


def test_a_dockerfile_chooses_its_checks() -> None:
    text = "# check=skip=MaintainerDeprecated,JSONArgsRecommended\nFROM busybox:1\nMAINTAINER me\nCMD x\nENV a b\n"
    assert [one.partition(":")[0] for one in found(text)] == ["LegacyKeyValueFormat"]
    assert found(text.replace("MaintainerDeprecated,JSONArgsRecommended", "all")) == []
    assert parse_choice("skip=a, b;error=true") == CheckSelection(False, frozenset({"a", "b"}), True)
    assert parse_choice("error=false") == CheckSelection()
    for wrong, message in (
        ("skip", 'invalid check option "skip"'),
        ("error=maybe", "failed to parse"),
        ("x=y", "invalid"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            parse_choice(wrong)


def test_a_rule_has_a_page() -> None:
    assert Finding("JSONArgsRecommended", "", 1, 1).url.endswith("/rule/json-args-recommended/")
    assert Finding("FromAsCasing", "", 1, 1).url.endswith("/rule/from-as-casing/")
    assert Finding("UndefinedVar", "", 1, 1).description == "Variables should be defined before their use"


def test_words_that_are_far_apart_or_long_are_not_suggested() -> None:
    assert suggested("RUNN", ["RUN", "ENV"]) == "RUN"
    assert suggested("RUN", ["RUN"]) == ""
    assert suggested("abcdef", ["uvwxyz"]) == ""
    assert suggested("x" * 100_000, ["x" * 99_999]) == ""


def test_a_dockerfile_of_ten_thousand_unknown_variables_is_checked_soon() -> None:
    """Without a bound of comparisons it takes hours, without one of findings the log of the build is full of them."""
    known = " \\\n".join(f"K{number}=x" for number in range(5000))
    unknown = " \\\n".join(f"U{number}=$N{number}" for number in range(10_000))
    assert len(found(f"FROM busybox:1\nENV {known}\nENV {unknown}\n")) == 1000
