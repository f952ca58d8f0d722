"""Several files as one document."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from skep.errors import InvalidArgument
from skep.stack.compose.document import FileProblems
from skep.stack.compose.loading import FileReader, LoadedStack, LoadOptions, load
from skep.stack.compose.reading import ProblemReport


def loaded(
    folder: Path,
    *names: str,
    environment: Mapping[str, str] = {},
    report: ProblemReport | None = None,
    **files: str,
) -> LoadedStack:
    """The document of the files ``names`` (``a``: all of ``a.yml``), written from ``files`` before."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ("" if "_env" in name else ".yml"))
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    paths = [folder / f"{name}.yml" for name in names]
    return load(
        paths,
        LoadOptions(environment=environment, profiles=("extra",)),
        FileReader(),
        report or ProblemReport(),
    )


def services(one: LoadedStack) -> Any:
    return one.document.plain()["services"]


def test_a_later_file_changes_an_earlier_one(tmp_path: Path) -> None:
    base = """
services:
  web:
    image: a
    command: [a, b]
    environment: [A=1, B=1]
    ports: ["80:80", "81:81"]
    volumes: ["one:/x", "two:/y"]
    dns: 1.1.1.1
    networks: [front]
    logging: {driver: local, options: {a: "1"}}
    healthcheck: {test: [CMD, a], retries: 3}
    cap_add: [A]
    deploy: {labels: [a=1, b=1]}
    build: {args: [A=1, B=1]}
"""
    above = """
services:
  web:
    command: [c]
    environment: {B: "2", C: "3"}
    ports: ["80:80", "82:82"]
    volumes: ["three:/y:ro"]
    dns: [2.2.2.2]
    networks: {front: {aliases: [w]}, back: }
    logging: {options: {b: "2"}}
    healthcheck: {test: [CMD, b]}
    cap_add: [B]
    deploy: {labels: {b: "2"}}
    build: {context: /c, args: {B: "2"}}
"""
    assert services(loaded(tmp_path, "base", "above", base=base, above=above))["web"] == {
        "image": "a",
        "command": ["c"],
        "environment": {"A": "1", "B": "2", "C": "3"},
        "ports": ["80:80", "81:81", "82:82"],
        "volumes": ["one:/x", "three:/y:ro"],
        "dns": ["1.1.1.1", "2.2.2.2"],
        "networks": {"front": {"aliases": ["w"]}, "back": None},
        "logging": {"driver": "local", "options": {"a": "1", "b": "2"}},
        "healthcheck": {"test": ["CMD", "b"], "retries": 3},
        "cap_add": ["A", "B"],
        "deploy": {"labels": {"a": "1", "b": "2"}},
        "build": {"context": "/c", "args": {"A": "1", "B": "2"}},
    }


def test_reset_removes_and_override_replaces(tmp_path: Path) -> None:
    base = "services: {web: {image: a, ports: ['1:1'], environment: {A: 1, B: 2}, read_only: true}}"
    above = (
        "services:\n  web:\n    ports: !override ['2:2']\n    environment: {A: !reset null}\n"
        "    read_only: !reset false\n"
    )
    assert services(loaded(tmp_path, "base", "above", base=base, above=above))["web"] == {
        "image": "a",
        "ports": ["2:2"],
        "environment": {"B": 2},
    }


def test_included_files_have_their_own_folder_and_variables(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.txt").write_text("content")
    one = loaded(
        tmp_path,
        "main",
        main="include: [{path: sub/inner.yml, env_file: sub/vars_env}]\nservices: {web: {image: 'w${V-}'}}",
        sub__inner="services: {db: {image: 'db:${V}', volumes: ['./d:/d']}}\nconfigs: {c: {file: c.txt}}",
        sub__vars_env="V=7",
    )
    assert services(one) == {
        "db": {"image": "db:7", "volumes": [f"{tmp_path}/sub/d:/d"]},
        "web": {"image": "w"},
    }
    assert one.contents == {("configs", "c"): b"content"}


def test_names_without_a_value_in_an_included_file_get_the_variables_of_that_file(tmp_path: Path) -> None:
    """The name of the included project stays its own."""
    report = ProblemReport()
    one = loaded(
        tmp_path,
        "main",
        environment={"OUT": "o"},
        report=report,
        main="include: [{path: sub/inner.yml, env_file: sub/vars_env}]\nservices: {web: {image: w}}",
        sub__inner="""
name: inner
services: {db: {image: d, environment: [V, OUT, NOBODY], env_file: e_env}}
secrets: {s: {environment: V}}
""",
        sub__vars_env="V=7\nOUT=inner",
        sub__e_env="NOBODY=e",
    )
    assert services(one)["db"]["environment"] == {"V": "7", "OUT": "o", "NOBODY": "e"}
    assert (one.name, one.contents) == ("", {("secrets", "s"): b"7"})
    report.raise_problems()


def test_one_file_in_a_container_has_one_identity_in_all_files(tmp_path: Path) -> None:
    base = "services: {web: {image: i, configs: [c, d], secrets: [s], env_file: [e_env, f_env]}}"
    above = """
services:
  web:
    configs: [{source: x, target: /c}]
    secrets: [{source: y, target: /run/secrets/s}]
    env_file: [{path: ./e_env, required: false}]
"""
    one = services(loaded(tmp_path, "base", "above", base=base, above=above, f_env=""))["web"]
    assert one["configs"] == [{"source": "x", "target": "/c"}, "d"]
    assert one["secrets"] == [{"source": "y", "target": "/run/secrets/s"}]
    assert one["env_file"] == [{"path": f"{tmp_path}/e_env", "required": False}, f"{tmp_path}/f_env"]


def test_a_dockerfile_is_in_its_context_and_contexts_are_beside_the_file(tmp_path: Path) -> None:
    text = """
services:
  a: {build: {context: app, dockerfile: d/File, additional_contexts: {x: ../x, y: "docker-image://b"}}}
  b: {build: ./b}
  c: {build: {context: "https://r.example/x.git", dockerfile: File}}
  d: {build: {context: app, dockerfile: /etc/File, additional_contexts: ["z=z"]}}
  e: {build: {dockerfile: File}}
"""
    app, other = f"{tmp_path}/app", tmp_path.parent / "x"
    assert {name: one["build"] for name, one in services(loaded(tmp_path, "main", main=text)).items()} == {
        "a": {
            "context": app,
            "dockerfile": f"{app}/d/File",
            "additional_contexts": {"x": str(other), "y": "docker-image://b"},
        },
        "b": {"context": f"{tmp_path}/b"},
        "c": {"context": "https://r.example/x.git", "dockerfile": "File"},
        "d": {"context": app, "dockerfile": "/etc/File", "additional_contexts": {"z": f"{tmp_path}/z"}},
        "e": {"context": str(tmp_path), "dockerfile": f"{tmp_path}/File"},
    }
    above = "services: {a: {build: {dockerfile: Other}}, b: {build: {target: t}}}"
    changed = services(loaded(tmp_path, "main", "above", above=above))
    assert changed["a"]["build"]["dockerfile"] == f"{app}/Other"
    assert changed["b"]["build"] == {"context": f"{tmp_path}/b", "target": "t"}


def test_two_included_files_do_not_change_each_other(tmp_path: Path) -> None:
    report = ProblemReport()
    loaded(
        tmp_path,
        "main",
        report=report,
        main="include: [a.yml, b.yml]\nservices: {}",
        a="services: {web: {image: a}}",
        b="services: {web: {image: b}}",
    )
    with pytest.raises(
        FileProblems, match=r"b\.yml:1:17: services\.web: .*a\.yml:1:17 has another web already"
    ):
        report.raise_problems()


def test_a_service_extends_one_of_its_file_or_of_another(tmp_path: Path) -> None:
    one = loaded(
        tmp_path,
        "main",
        main="""
services:
  a: {extends: b, environment: {X: "2"}}
  b: {extends: {file: sub/base.yml, service: base}, command: run}
""",
        sub__base="""
services:
  base: {extends: root, image: i, depends_on: [x], volumes: ["./v:/v"]}
  root: {environment: {X: "1", Y: "1"}, user: u}
""",
    )
    both = {"image": "i", "command": "run", "volumes": [f"{tmp_path}/sub/v:/v"], "user": "u"}
    assert services(one) == {
        "a": both | {"environment": {"X": "2", "Y": "1"}},
        "b": both | {"environment": {"X": "1", "Y": "1"}},
    }


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"main": "include: main.yml\nservices: {}"}, "the file includes itself: .*main.yml -> .*main.yml"),
        ({"main": "include: a.yml", "a": "include: main.yml"}, "the file includes itself: .* -> .* -> "),
        ({"main": "include: no.yml"}, "no.yml cannot be read: no such file or directory"),
        (
            {"main": "services: {a: {extends: b}, b: {extends: a}}"},
            r"main\.yml:1:25: services\.a\.extends: services extend each other",
        ),
        (
            {"main": "services: {a: {extends: c}}"},
            r"main\.yml:1:25: services\.a\.extends: there is no service c in ",
        ),
        ({"main": "services: {a: {extends: {file: m.yml, service: c}}}"}, "m.yml cannot be read"),
        ({"main": 'include: "a\\0b"'}, "is not a path: .*embedded null (byte|character)"),
    ],
)
def test_files_that_cannot_be_joined_are_an_error(tmp_path: Path, files: dict[str, str], error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        loaded(tmp_path, "main", **files)


def test_services_of_other_profiles_are_left_out(tmp_path: Path) -> None:
    text = "services: {a: {image: a}, b: {image: b, profiles: [extra]}, c: {image: c, profiles: [other]}}"
    assert sorted(services(loaded(tmp_path, "main", main=text))) == ["a", "b"]
    every = load(
        [tmp_path / "main.yml"], LoadOptions(environment={}, profiles=("*",)), FileReader(), ProblemReport()
    )
    assert sorted(services(every)) == ["a", "b", "c"]


def test_files_of_services_of_other_profiles_are_not_read(tmp_path: Path) -> None:
    """A certificate that a label names is used as well."""
    text = """
services:
  a: {image: a, secrets: [both], x-skep: {http: {host: h.example, tls-secret: cert}}}
  c: {image: c, profiles: [other], secrets: [both, {source: own}, cert], configs: [own]}
secrets: {both: {file: s}, own: {file: no}, cert: {file: s}, nobody: {file: s}}
configs: {own: {environment: NO}}
"""
    (tmp_path / "s").write_text("s")
    report = ProblemReport()
    one = loaded(tmp_path, "main", report=report, main=text)
    report.raise_problems()
    assert sorted(one.contents) == [("secrets", name) for name in ("both", "cert", "nobody")]


def test_a_file_of_variables_and_a_variable_that_are_not_there_are_errors(tmp_path: Path) -> None:
    report = ProblemReport()
    text = "services: {w: {image: w, env_file: no_env, label_file: no}}\nsecrets: {s: {environment: NO}}"
    loaded(tmp_path, "main", report=report, main=text)
    with pytest.raises(FileProblems) as caught:
        report.raise_problems()
    assert [str(one).replace(f"{tmp_path}/", "") for one in caught.value.problems] == [
        "main.yml:1:36: services.w.env_file[0].path: no_env cannot be read: no such file or directory",
        "main.yml:1:56: services.w.label_file: no cannot be read: no such file or directory",
        "main.yml:2:28: secrets.s.environment: the variable NO is not set",
    ]


def test_variables_come_from_the_environment_before_the_file_beside(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("A=file\nB=file\n")
    report = ProblemReport()
    one = loaded(
        tmp_path, "main", environment={"A": "out"}, report=report, main="services: {w: {image: '$A-$B-$C'}}"
    )
    assert services(one)["w"]["image"] == "out-file-"
    assert [str(one).removeprefix(f"{tmp_path}/") for one in report.warnings] == [
        ".env:1:1: variables are read from this file",
        "main.yml:1:1: the variable C is not set: it is taken as empty",
    ]


def test_environments_are_put_together(tmp_path: Path) -> None:
    text = """
services:
  w:
    image: w
    env_file: [one_env, {path: no_env, required: false}, {path: raw_env, format: raw}]
    environment: [A=given, HOST, NOBODY]
    label_file: labels_env
    labels: {b: given}
"""
    one = loaded(
        tmp_path, "main", environment={"HOST": "h"}, main=text,
        one_env="A=1\nB='2'\n", raw_env="R='r'\n", labels_env="a=1\nb=1\n",
    )  # fmt: skip
    assert services(one)["w"]["environment"] == {"A": "given", "B": "2", "R": "'r'", "HOST": "h"}
    assert services(one)["w"]["labels"] == {"a": "1", "b": "given"}


def test_secrets_come_from_files_and_the_environment(tmp_path: Path) -> None:
    (tmp_path / "pw").write_bytes(b"\x00\xff")
    text = "secrets: {a: {file: pw}, b: {environment: B}, c: {external: true}}\nservices: {}"
    one = loaded(tmp_path, "main", environment={"B": "x"}, main=text)
    assert one.contents == {("secrets", "a"): b"\x00\xff", ("secrets", "b"): b"x"}


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    report = ProblemReport()
    loaded(tmp_path, "main", report=report, main="configs: {a: {file: pipe}, b: {file: no}}\nservices: {}")
    with pytest.raises(FileProblems) as caught:
        report.raise_problems()
    assert [str(one).split(": ", 2)[2] for one in caught.value.problems] == [
        f"{tmp_path}/pipe is not a regular file",
        f"{tmp_path}/no cannot be read: no such file or directory",
    ]


def test_a_service_that_is_reset_is_not_there_and_all_files_cannot_be(tmp_path: Path) -> None:
    text = "services: {a: !reset {extends: c}, b: {image: b}}"
    assert services(loaded(tmp_path, "main", main=text)) == {"b": {"image": "b"}}
    with pytest.raises(FileProblems, match="!reset removes a value, not all files before this one"):
        loaded(tmp_path, "main", "none", none="!reset {services: {}}")
