"""Builds by buildx and ``docker compose build``, the docker command's plug-ins of today, on a node of Skep."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.playground_rig import IMAGE, TestNode
from tests.support.plugins import plugin

pytestmark = pytest.mark.timeout(300)


def run(
    node: TestNode, home: Path, name: str, *words: str, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A plug-in as a command of its own; both its streams are the output."""
    done = subprocess.run(
        [str(plugin(name)), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=120,
        check=False,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "DOCKER_HOST": node.socket,
            **environment,
        },
    )
    assert not check or done.returncode == 0, f"{name} {' '.join(words)}: {done.stdout}"
    return done


def build(node: TestNode, home: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(node, home, "docker-buildx", "build", "--progress", "plain", *words, check=check)


def context(directory: Path, dockerfile: str, **files: str) -> str:
    directory.mkdir()
    for name, content in {"Dockerfile": dockerfile, **files}.items():
        (directory / name).write_text(content)
    return str(directory)


def test_a_context_is_built_with_secrets_and_found_again(m1: TestNode, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "file").write_text("more")
    place = context(
        tmp_path / "context",
        f"FROM base AS first\nARG A\nCOPY data /data\nRUN --mount=type=secret,id=p cat /run/secrets/p | wc -c > /size\n"
        f"RUN test $A = 1\nCOPY --from=more file /more\nFROM {IMAGE} AS other\nRUN false\n",
        data="data",
    )
    options = [
        *("--target", "first", "--build-arg", "A=1", "--secret", f"id=p,src={tmp_path / 'password'}"),
        *("--build-context", f"base=docker-image://{IMAGE}", "--build-context", f"more={tmp_path / 'more'}"),
        *("-t", "built:1", "--metadata-file", str(tmp_path / "meta"), "--label", "l=v"),
    ]
    first = build(m1, tmp_path, *options, place)
    assert "naming to docker.io/library/built:1" in first.stdout
    (image,) = json.loads(m1.docker("image", "inspect", "built:1").stdout)
    assert image["Config"]["Labels"]["l"] == "v"
    meta = json.loads((tmp_path / "meta").read_text())
    assert meta["containerimage.digest"] == meta["containerimage.config.digest"] == image["Id"]
    assert meta["image.name"] == "docker.io/library/built:1"
    again = build(m1, tmp_path, *options, place)
    assert again.stdout.count("CACHED") >= 3, again.stdout
    shown = m1.docker("run", "--rm", "built:1", "cat", "/size", "/data", "/more").stdout
    assert shown == "7\ndatamore"
    fresh = build(m1, tmp_path, *options, "--no-cache-filter", "first", place)
    assert "CACHED" not in fresh.stdout


def test_a_build_that_fails_says_why_and_tags_nothing(m1: TestNode, tmp_path: Path) -> None:
    place = context(tmp_path / "context", f"FROM {IMAGE}\nRUN echo said; exit 3\n")
    failed = build(m1, tmp_path, "-t", "unbuilt:1", place, check=False)
    assert failed.returncode != 0
    assert "said" in failed.stdout
    assert (
        'process "/bin/sh -c echo said; exit 3" did not complete successfully: exit code: 3' in failed.stdout
    )
    assert m1.docker("image", "inspect", "unbuilt:1", check=False).returncode != 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--platform", "linux/amd64,linux/arm64"),
            "Multi-platform build is not supported for the docker driver",
        ),
        (("--platform", "linux/s390x"), "and not for linux/s390x"),
        (("--provenance=true",), "Attestation is not supported for the docker driver"),
        (
            ("--cache-to", "type=local,dest=/nonexistent"),
            "Cache export is not supported for the docker driver",
        ),
        (("--output", "type=local,dest=/nonexistent"), "output local is not supported"),
        (("--call", "check"), "unsupported request frontend.lint"),
        (("--build-context", "a=https://localhost:1/x.git"), "named context a is not supported"),
        (("--allow", "security.insecure"), "granting entitlement security.insecure is not allowed"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    m1: TestNode, tmp_path: Path, options: tuple[str, ...], text: str
) -> None:
    refused = build(m1, tmp_path, *options, context(tmp_path / "context", f"FROM {IMAGE}\n"), check=False)
    assert refused.returncode != 0
    assert text in refused.stdout


def test_the_build_cache_and_the_last_builds_are_shown_and_removed(m1: TestNode, tmp_path: Path) -> None:
    place = context(
        tmp_path / "kept", f"FROM {IMAGE}\nCOPY . /\nRUN --mount=type=cache,target=/c echo x > /c/file\n"
    )
    build(m1, tmp_path, "--no-cache", place)
    shown = run(m1, tmp_path, "docker-buildx", "du", "--verbose").stdout
    assert "exec.cachemount" in shown
    assert "source.local" in shown
    assert "Total:" in run(m1, tmp_path, "docker-buildx", "prune", "-f").stdout
    assert "exec.cachemount" not in run(m1, tmp_path, "docker-buildx", "du", "--verbose").stdout
    listed = run(m1, tmp_path, "docker-buildx", "history", "ls", "--format", "{{.Name}} {{.Status}}").stdout
    assert "kept Completed" in listed
    assert "RUN --mount=type=cache" in run(m1, tmp_path, "docker-buildx", "history", "logs").stdout
    run(m1, tmp_path, "docker-buildx", "history", "rm", "--all")
    assert run(m1, tmp_path, "docker-buildx", "history", "ls", "--format", "{{.Name}}").stdout.strip() == ""


@pytest.mark.parametrize("bakes", ["true", "false"])
def test_compose_builds_services_with_what_their_files_say(m1: TestNode, tmp_path: Path, bakes: str) -> None:
    """By buildx, which it calls unless it is told not to, and by itself."""
    (tmp_path / ".docker").mkdir()
    plugins = {"cliPluginsExtraDirs": [str(plugin("docker-buildx").parent)]}
    (tmp_path / ".docker" / "config.json").write_text(json.dumps(plugins))
    for name in ("first", "second"):
        context(tmp_path / name, f"FROM {IMAGE}\nARG WORD\nRUN echo $WORD > /word\n")
    (tmp_path / "compose.yaml").write_text(
        "services:\n"
        "  one: {image: 'composed:1', build: {context: first, args: {WORD: first}}}\n"
        "  two: {image: 'composed:2', build: {context: second, args: {WORD: second}, labels: {a: b}}}\n"
    )
    run(m1, tmp_path, "docker-compose", "--project-directory", str(tmp_path), "build", COMPOSE_BAKE=bakes)
    for number, word in ((1, "first\n"), (2, "second\n")):
        assert m1.docker("run", "--rm", f"composed:{number}", "cat", "/word").stdout == word
