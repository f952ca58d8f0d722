"""Builds by buildx and ``docker compose build``, the docker command's plug-ins of today, on a node of Skep."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import IMAGE, TestNode
from tests.support.machines.plugins import let_find, plugin

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
        (("--platform", "linux/s390x"), "is here for linux/amd64, not linux/s390x"),
        (("--cache-to", "type=nosuch"), 'unknown cache exporter: "nosuch"'),
        (("--sbom=true",), "Attestations are not supported by the current BuildKit daemon"),
        (("--provenance=true",), "Attestations are not supported by the current BuildKit daemon"),
        (("--output", "type=oci,dest=/dev/null"), 'exporter "oci" could not be found'),
        (
            ("--output", "type=docker,dest=/dev/null"),
            'exporter "docker" could not be found',
        ),
        (("--build-context", "a=ssh://git@localhost:1/x.git"), "named context a is not supported"),
        (("--allow", "security.insecure"), "granting entitlement security.insecure is not allowed"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    m1: TestNode, tmp_path: Path, options: tuple[str, ...], text: str
) -> None:
    refused = build(m1, tmp_path, *options, context(tmp_path / "context", f"FROM {IMAGE}\n"), check=False)
    assert refused.returncode != 0
    assert text in refused.stdout


def test_the_files_of_a_result_are_written_to_the_clients_directory_or_to_an_archive(
    m1: TestNode, tmp_path: Path
) -> None:
    """Links, modes, owners and times as in the image; what a client has already is not sent again."""
    place = context(
        tmp_path / "context",
        f"FROM {IMAGE} AS made\n"
        "RUN mkdir -p /out/a.b /out/a && echo one > /out/a/file && ln /out/a/file /out/a.b/first"
        " && ln -s a/file /out/link && touch /out/empty && chmod 2750 /out/a && chown 5:6 /out/empty"
        " && head -c 3000000 /dev/zero > /out/large && touch -t 200102030405 /out/large\n"
        "FROM scratch\nCOPY --from=made /out /\n",
    )
    for _ in range(2):
        build(m1, tmp_path, "--output", str(tmp_path / "out"), place)
    build(m1, tmp_path, "-t", "unused:1", "--output", f"type=tar,dest={tmp_path / 'out.tar'}", place)
    assert "unused" not in m1.docker("images").stdout
    with tarfile.open(tmp_path / "out.tar") as archive:
        archive.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)  # Python 3.11.4 and later
        archive.extractall(tmp_path / "unpacked")
    for root in (tmp_path / "out", tmp_path / "unpacked"):
        found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        assert found == ["a", "a.b", "a.b/first", "a/file", "empty", "large", "link"]
        assert (root / "link").readlink() == Path("a/file")
        assert (root / "a.b/first").read_text() == "one\n"
        assert (root / "a/file").samefile(root / "a.b/first")
        assert (root / "a").stat().st_mode & 0o7777 == 0o2750
        assert (root / "large").read_bytes() == bytes(3_000_000)
        assert int((root / "large").stat().st_mtime) == 981_173_100
    status = (tmp_path / "unpacked/empty").stat()
    assert (status.st_uid, status.st_gid) == (5, 6)


def test_the_build_cache_and_the_last_builds_are_shown_and_removed(m1: TestNode, tmp_path: Path) -> None:
    place = context(
        tmp_path / "kept", f"FROM {IMAGE}\nCOPY . /\nRUN --mount=type=cache,target=/c echo x > /c/file\n"
    )
    build(m1, tmp_path, "--no-cache", place)
    shown = run(m1, tmp_path, "docker-buildx", "du", "--verbose").stdout
    assert "exec.cachemount" in shown
    assert "source.local" in shown
    for kept in ("until=24h", "unused-for=24h"):  # buildx sends the duration to the builder
        run(m1, tmp_path, "docker-buildx", "prune", "-f", "--filter", kept)
        assert "exec.cachemount" in run(m1, tmp_path, "docker-buildx", "du", "--verbose").stdout
    run(m1, tmp_path, "docker-buildx", "prune", "-f", "--filter", "until=1ms")
    assert "exec.cachemount" not in run(m1, tmp_path, "docker-buildx", "du", "--verbose").stdout
    build(m1, tmp_path, "--no-cache", place)
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
    let_find(tmp_path, "docker-buildx")
    for name in ("first", "second"):
        context(tmp_path / name, f"FROM {IMAGE}\nARG WORD\nRUN echo $WORD > /word\n")
    (tmp_path / "compose.yaml").write_text(
        "services:\n"
        "  one: {image: 'composed:1', build: {context: first, args: {WORD: first}}}\n"
        "  two: {image: 'composed:2', build: {context: second, args: {WORD: second}, labels: {a: b}}}\n"
        "  three: {image: 'composed:3', build: {context: second, args: {WORD: third}}}\n"
    )
    run(m1, tmp_path, "docker-compose", "--project-directory", str(tmp_path), "build", COMPOSE_BAKE=bakes)
    for number, word in ((1, "first\n"), (2, "second\n"), (3, "third\n")):
        assert m1.docker("run", "--rm", f"composed:{number}", "cat", "/word").stdout == word


def test_targets_of_one_folder_are_baked_together(m1: TestNode, tmp_path: Path) -> None:
    """Their common session is opened by a call of the control connection."""
    place = Path(
        context(
            tmp_path / "context",
            f"FROM {IMAGE} AS one\nCOPY data /one\nFROM {IMAGE} AS two\nCOPY data /two\nRUN cat /two > /three\n",
            data="x" * (3 << 20),
        )
    )
    (place / "docker-bake.hcl").write_text(
        'group "default" { targets = ["one", "two"] }\n'
        'target "one" {\n  target = "one"\n  tags = ["baked:1"]\n}\n'
        'target "two" {\n  target = "two"\n  tags = ["baked:2"]\n}\n'
    )
    words = ("bake", "--progress", "plain", "--metadata-file", str(tmp_path / "meta"))
    files = ("-f", str(place / "docker-bake.hcl"), "--set", f"*.context={place}")
    run(m1, tmp_path, "docker-buildx", *words, *files, BUILDX_BAKE_ENTITLEMENTS_FS="0")
    meta = json.loads((tmp_path / "meta").read_text())
    for number, (target, path) in enumerate((("one", "/one"), ("two", "/three")), 1):
        (image,) = json.loads(m1.docker("image", "inspect", f"baked:{number}").stdout)
        assert meta[target]["containerimage.digest"] == image["Id"]
        assert m1.docker("run", "--rm", f"baked:{number}", "wc", "-c", path).stdout.split()[0] == str(3 << 20)


def test_the_id_of_an_image_is_written_to_a_file(m1: TestNode, tmp_path: Path) -> None:
    place = context(tmp_path / "context", f"FROM {IMAGE}\n")
    build(m1, tmp_path, "--iidfile", str(tmp_path / "id"), "-t", "named:1", place)
    (image,) = json.loads(m1.docker("image", "inspect", "named:1").stdout)
    assert (tmp_path / "id").read_text() == image["Id"]


def test_a_builder_in_a_container_is_started_with_its_rights_and_removed(
    m1: TestNode, tmp_path: Path
) -> None:
    """All that ``--driver docker-container`` asks of the engine, with an image that stands in for ``moby/buildkit``."""
    place = tmp_path / "context"
    context(
        place,
        f'FROM {IMAGE}\nCOPY buildctl buildkitd /usr/bin/\nENTRYPOINT ["buildkitd"]\n',
        buildctl='#!/bin/sh\necho "$@" >>/var/lib/buildkit/calls\n[ "$1 $2" = "debug workers" ]\n',
        buildkitd="#!/bin/sh\ntrap 'exit 0' TERM INT\nwhile :; do sleep 1 & wait $!; done\n",
    )
    for name in ("buildctl", "buildkitd"):
        (place / name).chmod(0o755)
    build(m1, tmp_path, "-t", "buildkit-stand-in:1", str(place))

    def buildx(*words: str) -> subprocess.CompletedProcess[str]:
        return run(m1, tmp_path, "docker-buildx", *words, check=False)

    options = ("--driver-opt", "image=buildkit-stand-in:1")
    assert buildx("create", "--driver", "docker-container", "--name", "apart", *options).returncode == 0
    try:
        booted = buildx("inspect", "--bootstrap", "apart")
        assert "creating container buildx_buildkit_apart0" in booted.stdout, booted.stdout
        made = json.loads(m1.docker("inspect", "buildx_buildkit_apart0").stdout)[0]
        assert made["State"]["Running"]
        assert made["HostConfig"]["Privileged"]
        assert [one["Name"] for one in made["Mounts"]] == ["buildx_buildkit_apart0_state"]
        calls = m1.docker("exec", "buildx_buildkit_apart0", "cat", "/var/lib/buildkit/calls").stdout
        assert {"debug workers", "dial-stdio"} <= {
            " ".join(one.split()[-2:]) for one in calls.splitlines()
        } | set(calls.split())
    finally:
        removed = buildx("rm", "apart")
    assert removed.returncode == 0, removed.stdout
    assert "buildx_buildkit" not in m1.docker("ps", "-a").stdout
    assert "buildx_buildkit" not in m1.docker("volume", "ls").stdout


def test_a_builder_whose_image_cannot_be_had_names_it(m1: TestNode, tmp_path: Path) -> None:
    run(m1, tmp_path, "docker-buildx", "create", "--driver", "docker-container", "--name", "without")
    refused = run(m1, tmp_path, "docker-buildx", "inspect", "--bootstrap", "without", check=False)
    assert refused.returncode != 0
    assert "pulling image moby/buildkit:buildx-stable-1" in refused.stdout
    run(m1, tmp_path, "docker-buildx", "rm", "without")
