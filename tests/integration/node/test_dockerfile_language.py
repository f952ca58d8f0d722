"""The rules of BuildKit's Dockerfile reference, one by one, on real runc (docs/conformance/dockerfile.md).

``SKEP_REFERENCE_DOCKER=unix:///path`` runs the same Dockerfiles on that engine, whose results have to be the same.
"""

import dataclasses
import json
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tests.support.builds import dockerfile_oddities as oddities
from tests.support.builds import dockerfile_steps as steps
from tests.support.builds import dockerfile_table as table
from tests.support.builds.build_lab import BuildLab, build_lab
from tests.support.builds.dockerfile_cases import Case, Host, differences
from tests.support.machines.playground_rig import CLIS
from tests.support.machines.plugins import plugin

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[BuildLab]:
    async with build_lab(tmp_path) as lab:
        yield lab


@pytest.fixture
async def host(lab: BuildLab) -> Host:
    """A node with an image that has users, or the engine of the reference."""
    buildx = plugin("docker-buildx")
    if reference := os.environ.get("SKEP_REFERENCE_DOCKER"):
        return Host(reference, CLIS[0], buildx, options=("--network", "none"))
    host = Host(f"unix://{lab.socket}", CLIS[0], buildx)
    users = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001::/home/alice:/bin/sh\n"
    context = lab.context(
        "FROM busybox:1 AS old\nFROM scratch\nCOPY --from=old / /\nCOPY passwd group /etc/\n"
        'RUN mkdir -p /tmp\nCMD ["sh"]\n',
        {"passwd": users, "group": "root:x:0:\nstaff:x:1001:\n"},
    )
    code, output = await host.build(context, "-t", "busybox:1")
    assert code == 0, output
    return host


async def check(host: Host, cases: Sequence[Case], directory: Path) -> None:
    """Carry all cases out, and say which of them are not as they should be."""
    of_skep = "SKEP_REFERENCE_DOCKER" not in os.environ
    wrong = []
    for number, case in enumerate(cases):
        if case.is_beyond and not of_skep:
            continue
        unique = secrets.token_hex(4)
        fresh = ("--no-cache",) if case.shows else ()  # an engine that has the step shows no output again
        own = dataclasses.replace(
            case, dockerfile=case.dockerfile.replace("UNIQUE", unique), options=(*case.options, *fresh)
        )
        built = await host.carry_out(own, directory / f"case-{number}", f"case-{unique}:1")
        wrong += [f"{case.name}: {text}" for text in differences(own, built, of_skep=of_skep)]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(
    "group",
    [
        "TEXT",
        "VARIABLES",
        "SCOPES",
        "STAGES",
        "RUN",
        "MOUNTS",
        "CONFIGURATION",
        "TRIGGERS",
        "CONTEXTS",
        "TIMES",
        "WRITING",
        "VALUES",
        "STEPS",
        "REFUSALS",
    ],
)
async def test_dockerfiles_give_what_the_reference_says(host: Host, group: str, tmp_path: Path) -> None:
    cases = next(getattr(module, group) for module in (table, steps, oddities) if hasattr(module, group))
    await check(host, cases, tmp_path)


@pytest.fixture
def only_here() -> None:
    if "SKEP_REFERENCE_DOCKER" in os.environ:
        pytest.skip("of Skep alone")


@pytest.mark.usefixtures("only_here")
async def test_cache_sources_and_places_never_fail_a_build(host: Host, lab: BuildLab) -> None:
    """A source that is missing is a warning.  buildx itself leaves out caches of services."""
    context = lab.context("FROM busybox:1\nRUN cat /proc/sys/kernel/random/uuid > /when\n")
    code, output = await host.build(context, "-t", "first:1", "--build-arg", "BUILDKIT_INLINE_CACHE=1")
    assert code == 0, output
    assert "not exported" not in output
    for source in (
        "127.0.0.1:1/gone:latest",
        "type=registry,ref=127.0.0.1:1/gone:latest",
    ):
        code, output = await host.build(context, "-t", "next:1", "--cache-from", source)
        assert code == 0, output
        assert "cache source 127.0.0.1:1/gone:latest is not used: " in output, f"{source}: {output}"
        assert "CACHED" in output
    code, output = await host.build(
        context, "-t", "next:1", "--cache-from", "first:1", "--cache-to", "type=inline"
    )
    assert code == 0, output
    assert "cache source" not in output
    assert lab.images.get("first:1").id == lab.images.get("next:1").id


@pytest.mark.usefixtures("only_here")
@pytest.mark.parametrize(
    ("text", "argument", "is_found"),
    [
        ("ARG V\nSTEP", "V", False),
        ("STEP\nARG V\nRUN true\n", "V", True),
        ("ARG V\nENV W=$V\nSTEP", "V", False),
        ("ARG V\nENV V=constant\nSTEP", "V", True),
        ("STEP", "HTTP_PROXY", True),
        ("ARG HTTP_PROXY\nSTEP", "HTTP_PROXY", False),
    ],
    ids=["used", "declared-later", "in-env", "hidden-by-env", "proxy", "declared-proxy"],
)
async def test_another_argument_carries_out_the_steps_that_see_it(
    host: Host, lab: BuildLab, text: str, argument: str, is_found: bool
) -> None:
    context = lab.context(
        "FROM busybox:1\n" + text.replace("STEP", "RUN cat /proc/sys/kernel/random/uuid > /when")
    )
    for value in ("http://a", "http://b"):
        code, output = await host.build(context, "-t", f"{value[-1]}:1", "--build-arg", f"{argument}={value}")
        assert code == 0, output
    assert (lab.text("a:1", "when") == lab.text("b:1", "when")) == is_found


@pytest.mark.usefixtures("only_here")
async def test_a_step_without_changes_has_no_layer(host: Host, lab: BuildLab) -> None:
    code, output = await host.build(lab.context("FROM busybox:1\nRUN true\n"), "-t", "made:1")
    assert code == 0, output
    assert lab.images.get("made:1").chain == lab.images.get("busybox:1").chain


@pytest.mark.usefixtures("only_here")
async def test_a_classic_build_passes_over_cache_sources_that_are_not_here(host: Host, lab: BuildLab) -> None:
    context = lab.context("FROM busybox:1\nRUN cat /proc/sys/kernel/random/uuid > /when\n")
    first = await lab.build(context, "-t", "first:1", "--cache-from", "127.0.0.1:1/gone:latest")
    assert first.exit == 0, first.output
    again = await lab.build(
        context, "-t", "next:1", "--cache-from", "first:1", "--cache-from", "127.0.0.1:1/gone"
    )
    assert again.exit == 0, again.output
    assert lab.images.get("first:1").id == lab.images.get("next:1").id


@pytest.mark.usefixtures("only_here")
@pytest.mark.parametrize(
    "text",
    [
        "FROM busybox:1\nRUN echo a > /f\nENV A=b\nLABEL c=d\n",
        """FROM busybox:1 AS a
RUN echo a > /f
FROM long:1 AS b
RUN echo b > /f
FROM a
ENV A=b
COPY --from=b /f /g
LABEL c=d
""",
    ],
    ids=["one stage", "a base with more history between"],
)
async def test_the_same_epoch_gives_the_same_image_and_another_carries_out_no_step(
    host: Host, lab: BuildLab, text: str
) -> None:
    longer = lab.context("FROM busybox:1\n" + "".join(f"LABEL l{number}=x\n" for number in range(9)))
    code, output = await host.build(longer, "-t", "long:1")
    assert code == 0, output
    context = lab.context(text)
    options = ("--no-cache", "-t")
    ids = []
    for name in ("one:1", "two:1"):
        code, output = await host.build(context, *options, name, SOURCE_DATE_EPOCH="1700000000")
        assert code == 0, output
        image = lab.images.get(name)
        history = json.loads(lab.images.config_file(image).read_bytes())["history"]
        base = json.loads(lab.images.config_file(lab.images.get("busybox:1")).read_bytes())["history"]
        assert history[: len(base)] == base, "the base keeps its times"
        assert {entry["created"] for entry in history[len(base) :]} == {"2023-11-14T22:13:20Z"}
        ids.append(history)
    assert ids[0] == ids[1]
    code, output = await host.build(context, "-t", "two:1", SOURCE_DATE_EPOCH="1700000001")
    assert code == 0, output
    assert output.count("CACHED") >= 3, output
    assert (await host.inspect("two:1"))["Created"] == "2023-11-14T22:13:21Z"


@pytest.mark.usefixtures("only_here")
async def test_files_of_the_layers_have_no_later_time_where_that_is_asked_for(
    host: Host, lab: BuildLab
) -> None:
    context = lab.context(
        "FROM busybox:1\nWORKDIR /w\nRUN echo a > /w/f && ln -s f /w/l && touch -d @5 /w/old\n"
    )
    ids = []
    for name in ("one:1", "two:1"):
        output = f"type=image,name={name},rewrite-timestamp=true"
        code, said = await host.build(context, "--no-cache", output=output, SOURCE_DATE_EPOCH="1700000000")
        assert code == 0, said
        members = lab.files(name)
        times = {path: int(members[path].mtime) for path in ("w", "w/f", "w/l", "w/old")}
        assert times == {"w": 1700000000, "w/f": 1700000000, "w/l": 1700000000, "w/old": 5}
        ids.append(lab.images.get(name).id)
    assert ids[0] == ids[1]


WITH_FINDINGS = """# check=skip=MaintainerDeprecated
# last what it is for
FROM busybox:1 AS last
MAINTAINER me
# WHO who it is
ARG WHO=nobody
RUN --mount=type=secret,id=token,required --mount=type=ssh true
CMD $who
"""


@pytest.mark.usefixtures("only_here")
async def test_checks_are_made_alone_or_warn_in_a_build(host: Host, lab: BuildLab) -> None:
    context = lab.context(WITH_FINDINGS)
    code, output = await host.build(context, "--check")
    assert code == 1, output
    assert "Check complete, 1 warning has been found!" in output
    assert (
        "WARNING: JSONArgsRecommended - https://docs.docker.com/go/dockerfile/rule/json-args-recommended/"
        in output
    )
    assert "   8 | >>> CMD $who" in output
    code, output = await host.build(context, "--call=targets")
    assert (code, "last (default) what it is for" in output) == (0, True), output
    code, output = await host.build(context, "--call=outline", "--build-arg", "WHO=me")
    assert code == 0, output
    shown = " ".join(output.split())
    assert "TARGET: last DESCRIPTION: what it is for BUILD ARG VALUE DESCRIPTION WHO me who it is" in shown
    assert "SECRET REQUIRED token true SSH REQUIRED default" in shown, output
    warned = lab.context("FROM busybox:1\nCMD x\n")
    code, output = await host.build(warned, "-t", "warned:1")
    assert code == 0, output
    assert "JSONArgsRecommended: JSON arguments recommended for CMD" in output
    code, output = await host.build(warned, "--build-arg", "BUILDKIT_DOCKERFILE_CHECK=error=true")
    assert code != 0
    assert "lint violation found for rules: JSONArgsRecommended" in output
    code, output = await host.build(lab.context("FROM busybox:1\nRUNN x\n"), "--check")
    assert code != 0
    assert "unknown instruction: RUNN" in output


@pytest.mark.usefixtures("only_here")
async def test_a_target_of_a_bake_file_is_a_context_of_another(host: Host, lab: BuildLab) -> None:
    context = lab.context("FROM busybox:1\nENV A=b\nRUN echo base > /base\n")
    (context / "app").write_text(
        "FROM base\nRUN cat /base > /copy && echo $A >> /copy\nCOPY --from=base /base /own\n"
    )
    bake = {
        "group": {"default": {"targets": ["app"]}},
        "target": {
            "base": {"context": str(context)},
            "app": {
                "context": str(context),
                "dockerfile": "app",
                "contexts": {"base": "target:base"},
                "tags": ["app:1"],
            },
        },
    }
    (context / "bake.json").write_text(json.dumps(bake))
    words = ("bake", "--progress", "plain", "--allow", "fs=*", "-f", str(context / "bake.json"))
    code, out, err = await host.run(str(host.buildx), *words)
    assert code == 0, out + err
    assert lab.text("app:1", "copy") == "base\nb\n"
    assert lab.text("app:1", "own") == "base\n"
