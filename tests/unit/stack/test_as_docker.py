"""A file with every key of ``docker stack`` becomes what docker's command makes of it.

``recorded/full.docker-28.2.json``: the bodies that ``docker stack deploy --resolve-image never`` of docker 28.2 sent
for ``recorded/full.yml``, by name.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skep.model.values.encoding import to_json
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.loading import FileReader, LoadOptions, load
from skep.stack.compose.reading import ProblemReport

RECORDED = Path(__file__).parent / "recorded"
DELIBERATE = {
    # A version is kept as it is written; docker reads a number.
    ("c_web", "TaskTemplate.ContainerSpec.Env[3]"): ("NUM=1.1", "NUM=1.10"),
    # Quotes of an env_file as in Compose.
    ("c_web", "TaskTemplate.ContainerSpec.Env[5]"): ('QUOTED="x y"', "QUOTED=x y"),
    # That of the node.
    ("c_web", "TaskTemplate.ContainerSpec.Isolation"): ("default", None),
    ("c_front", "CheckDuplicate"): (None, True),
    ("c_back", "CheckDuplicate"): (None, True),
    ("c_back", "IPAM.Driver"): (None, "default"),
}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What is set; ids and names of secrets and configs, which have their content in them, are left out."""
    match value:
        case dict():
            for key, one in value.items():
                if key not in ("SecretID", "ConfigID", "SecretName", "ConfigName"):
                    yield from leaves(one, f"{path}.{key}".lstrip("."))
        case list():
            for at, one in enumerate(value):
                yield from leaves(one, f"{path}[{at}]")
        case None | "" | 0 | False:
            return
        case _:
            yield path, value


def test_every_key_becomes_the_field_that_it_becomes_by_docker() -> None:
    report = ProblemReport()
    choices = LoadOptions(environment={}, env_files=(), profiles=(), directory=None)
    loaded = load((str(RECORDED / "full.yml"),), choices, FileReader(""), report)
    stack = stack_of(loaded.document, "c", loaded.contents, report)
    report.raise_problems()
    ours = {one.spec.name: json.loads(to_json(one.spec)) for one in stack.services.values()}
    ours |= {one.name: dict(one.body) for one in stack.networks.values()}
    dockers = json.loads((RECORDED / "full.docker-28.2.json").read_text())
    assert ours.keys() == dockers.keys()
    differing = {}
    for name, body in dockers.items():
        wanted, found = dict(leaves(body)), dict(leaves(ours[name]))
        for path in wanted.keys() | found.keys():
            if wanted.get(path) != found.get(path):
                differing[name, path] = wanted.get(path), found.get(path)
    assert differing == DELIBERATE
