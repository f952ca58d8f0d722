"""`skep context`: the docker command's contexts, without the docker command."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from skep.cli.main import main
from skep.cli.maintain.version import versions
from skep.cli.passthrough import find_docker


def skep(folder: Path, *words: str, **environment: str) -> Any:
    return CliRunner().invoke(
        main,
        ["context", *words],
        env={"DOCKER_CONFIG": str(folder), "DOCKER_CONTEXT": None, "DOCKER_HOST": None, "SKEP_HOST": None}
        | environment,
    )


def docker(folder: Path, *words: str) -> str:
    command = [find_docker(), "--config", str(folder), "context", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def test_what_skep_writes_docker_reads_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auths": {"r.example": {}}}')
    (tmp_path / "ca").write_text("a certificate")
    tls = f"host=tcp://lab:2376,ca={tmp_path}/ca"
    assert (
        skep(tmp_path, "create", "prod", "ssh://root@m1", "--description", "the real one", "--use").exit_code
        == 0
    )
    assert skep(tmp_path, "create", "lab", "--docker", tls).exit_code == 0
    docker(tmp_path, "create", "hive", "--docker", "host=unix:///x.sock")
    assert docker(
        tmp_path, "ls", "--format", "{{.Name}} {{.Current}} {{.DockerEndpoint}} {{.Description}}"
    ).splitlines()[1:] == [
        "hive false unix:///x.sock ",
        "lab false tcp://lab:2376 ",
        "prod true ssh://root@m1 the real one",
    ]
    exported = json.loads(docker(tmp_path, "inspect", "lab"))[0]
    assert exported["TLSMaterial"] == {"docker": ["ca.pem"]}
    shown = skep(tmp_path, "ls", "--format", "{{.Name}} {{.Current}} {{.Host}}").output.splitlines()
    assert shown[1:] == ["hive false unix:///x.sock", "lab false tcp://lab:2376", "prod true ssh://root@m1"]
    assert skep(tmp_path, "show").output == "prod\n"
    assert json.loads((tmp_path / "config.json").read_text())["auths"] == {"r.example": {}}
    assert skep(tmp_path, "use", "default").exit_code == 0
    assert "default true" in docker(tmp_path, "ls", "--format", "{{.Name}} {{.Current}}")


def test_the_one_in_use_is_removed_by_force_only_with_its_keys(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    skep(tmp_path, "create", "lab", "--docker", f"host=tcp://lab:2376,key={tmp_path}/key", "--use")
    (kept,) = tmp_path.glob("contexts/tls/*/docker/key.pem")
    assert kept.stat().st_mode & 0o777 == 0o600
    refused = skep(tmp_path, "rm", "lab")
    assert (refused.exit_code, refused.output) == (
        1,
        'Error: context "lab" is in use, set -f flag to force remove\n',
    )
    assert skep(tmp_path, "rm", "--force", "lab").exit_code == 0
    assert not list(tmp_path.glob("contexts/*/*"))
    assert skep(tmp_path, "show").output == "default\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create", "default", "ssh://m1"), "reserved context name"),
        (("create", "../x", "ssh://m1"), "is invalid"),
        (("create", "x1", "nonsense://m1"), "unable to parse docker host"),
        (("create", "x1"), "Specify one node, such as skep context create NAME ssh://user@machine."),
        (("create", "x1", "--docker", "hots=tcp://m1"), "invalid setting 'hots=tcp://m1'"),
        (("use", "nowhere"), 'context "nowhere" is not in'),
        (("rm", "nowhere"), "List contexts with skep context ls"),
        (("rm", "default"), "cannot be removed"),
    ],
)
def test_what_is_refused_names_the_next_step_and_writes_nothing(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = skep(tmp_path, *words)
    assert done.exit_code == 1
    assert said in done.output
    assert not list(tmp_path.iterdir())


def test_a_variable_that_wins_is_named_and_a_second_of_a_name_is_refused(tmp_path: Path) -> None:
    skep(tmp_path, "create", "prod", "ssh://m1")
    used = skep(tmp_path, "use", "prod", DOCKER_HOST="unix:///x")
    assert "DOCKER_HOST is set and overrides the context" in used.output
    again = skep(tmp_path, "create", "prod", "ssh://m2")
    assert (again.exit_code, 'context "prod" already exists' in again.output) == (1, True)
    (broken,) = (tmp_path / "contexts/meta").iterdir()
    (broken / "meta.json").write_text("{")
    assert skep(tmp_path, "ls").exit_code == 0


@pytest.mark.parametrize("variable", ["DOCKER_HOST", "SKEP_HOST", "DOCKER_CONTEXT"])
def test_the_context_that_commands_use_is_marked(tmp_path: Path, variable: str) -> None:
    for name in ("prod", "lab"):
        skep(tmp_path, "create", name, f"ssh://{name}", "--use")
    value, used = ("prod", "prod") if variable == "DOCKER_CONTEXT" else ("unix:///x", "default")
    environment = {variable: value, **({"DOCKER_CONTEXT": "prod"} if value != "prod" else {})}
    assert skep(tmp_path, "show", **environment).output == f"{used}\n"
    rows = skep(tmp_path, "ls", "--format", "{{.Name}} {{.Current}}", **environment).output.splitlines()
    assert [row for row in rows if row.endswith("true")] == [f"{used} true"]
    assert skep(tmp_path, "show").output == "lab\n"


def test_versions_that_differ_are_found() -> None:
    def node(name: str, version: str, role: str = "worker") -> dict[str, Any]:
        description = {"Hostname": name, "Engine": {"EngineVersion": version}}
        return {"ID": name, "Description": description, "Spec": {"Role": role}, "Status": {"State": "ready"}}

    nodes = [node("w1", "0.2"), node("m1", "0.1", "manager"), node("w2", "0.1")]
    found = versions(nodes)
    assert found.exit_code == 3
    assert [row["Node"] for row in found.rows or ()] == ["m1", "w1", "w2"]
    assert versions(nodes[1:]).exit_code == 0
