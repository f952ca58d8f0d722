"""No key of the published Compose schema is unknown: it is honored, refused by name, or said to have no effect.

The schema is the one that Compose's own program has in it.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins

from docs.reference.compose_keys import rows_on_the_page
from skep.errors import InvalidArgument
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import FilePosition, YamlNode, mapping, scalar
from skep.stack.compose.loading import FileReader, LoadOptions, load
from skep.stack.compose.merging import canonical
from skep.stack.compose.reading import ProblemReport
from tests.support.machines.plugins import plugin

PLACE = FilePosition("f", 1, 1)
SECTIONS = ("services", "networks", "volumes", "secrets", "configs")
LABEL = re.compile(r"\bskep\.[a-z]+(?:[.-][a-z]+)*")


@cache
def schema() -> dict[str, Any]:
    """The JSON schema, which the program has as text."""
    program = plugin("docker-compose").read_bytes()
    at = program.find(b'"compose_spec.json"')
    while at >= 0:
        start = program.rfind(b'{\n  "$schema"', max(at - 400, 0), at)
        if start >= 0:
            found, _ = json.JSONDecoder().raw_decode(program[start : start + 400_000].decode(errors="ignore"))
            assert isinstance(found, dict)
            return found
        at = program.find(b'"compose_spec.json"', at + 1)
    raise AssertionError("the program has no schema in it")


def node(value: Any) -> YamlNode:
    if isinstance(value, dict):
        return mapping({key: node(one) for key, one in value.items()}, PLACE)
    if isinstance(value, list):
        return YamlNode(tuple(map(node, value)), PLACE)
    return YamlNode(None, PLACE) if value is None else scalar(value, PLACE)


class Sampler:
    """Values that a schema allows, in each of the forms that have keys."""

    def __init__(self, whole: dict[str, Any]) -> None:
        self._definitions = whole["definitions"]

    def forms(self, one: dict[str, Any], depth: int = 0) -> list[Any]:
        """For each key that may stand in ``one``, a value with it; a text where it has no keys."""
        if "$ref" in one:
            return self.forms(self._definitions[one["$ref"].rpartition("/")[2]], depth)
        if depth > 6:
            return []
        made: list[Any] = []
        for alternative in (*one.get("oneOf", ()), *one.get("anyOf", ())):
            made += self.forms(alternative, depth)
        for key, below in one.get("properties", {}).items():
            made += [{key: value} for value in self.forms(below, depth + 1)]
        patterns = one.get("patternProperties", {})
        for pattern, below in patterns.items():
            if "x-" not in pattern:
                made += [{"name": value} for value in self.forms(below, depth + 1)]
        items = one.get("items")
        if items is not None:
            made += [[value] for value in self.forms(items, depth + 1)]
        return made or ["1"]


def paths_of(value: Any) -> str:
    if isinstance(value, dict):
        return next((f".{key}{paths_of(one)}" for key, one in value.items()), "")
    return f"[]{paths_of(value[0])}" if isinstance(value, list) and value else ""


@pytest.mark.parametrize("section", SECTIONS)
def test_no_key_of_the_schema_is_unknown(section: str) -> None:
    whole = schema()
    definition = {"services": "service"}.get(section, section.removesuffix("s"))
    forms = Sampler(whole).forms({"$ref": f"#/definitions/{definition}"})
    assert len(forms) > 5
    unknown: list[str] = []
    for form in forms:
        text = {"services": {"w": {"image": "w"}}} | {section: {"one": form}}
        report = ProblemReport()
        stack_of(canonical(node(text)), "s", {}, report)
        if any("unknown key" in one.text for one in report.problems):
            unknown.append(paths_of(form))
    assert unknown == []


def test_no_section_of_the_schema_is_unknown() -> None:
    for section in schema()["properties"]:
        report = ProblemReport()
        stack_of(canonical(node({"services": {"w": {"image": "w"}}, section: {}})), "s", {}, report)
        assert not any("unknown key" in one.text for one in report.problems), section


# --- what is taken has an effect -------------------------------------------------------------------------------------

CANDIDATES: tuple[Any, ...] = (
    "1", "true", "1s", "a", "/a", "A=b", "a:b", "0.5", "0-1", "80", "s", "other", "1.2.3.4", "10.9.0.0/24", "a:1.2.3.4",
    "none", "host", "global", "dnsrr", "rollback", "start-first", "pause", "on-failure", "service_healthy", "udp",
    "no-new-privileges:true", "linux/arm64", "c 1:3 rwm", "rslave", "disabled", "64m", "0400", "/dev/a:/dev/b", "r",
    "NONE", "false", "127.0.0.1", "gpu", "always", "z", "v", "c", "tmpfs", {"kind": "gpu", "value": "2"},
)  # fmt: skip
"""Values, of which each key takes some."""
CONTENTS: dict[str, dict[str, Any]] = {
    "services": {"image": "w"},
    "secrets": {"file": "f"},
    "configs": {"file": "f"},
    "services.secrets[]": {"source": "s"},
    "services.configs[]": {"source": "c"},
    "services.ports[]": {"target": "80", "published": "8080"},
    "services.devices[]": {"source": "/dev/a"},
    "services.gpus[]": {"capabilities": ["gpu"]},
    "services.healthcheck": {"test": "a"},
    "services.volumes[]": {"type": "volume", "source": "v", "target": "/t"},
    "services.ulimits.name": {"hard": "5", "soft": "5"},
    "services.deploy.resources.reservations.devices[]": {"capabilities": ["gpu"]},
}
"""What stands in a mapping for a key of it to mean something."""
for _limit in ("read_bps", "read_iops", "write_bps", "write_iops"):
    CONTENTS[f"services.blkio_config.device_{_limit}[]"] = {"path": "/dev/a", "rate": "10"}
BESIDE: dict[str, dict[str, Any]] = {
    "services.healthcheck.disable": {},
    "services.volumes[].type": {"target": "/t"},
    "services.volumes[].bind": {"type": "bind", "source": "/v", "target": "/t"},
    "services.volumes[].tmpfs": {"type": "tmpfs", "target": "/t"},
    "services.volumes[].image": {"type": "image", "source": "i", "target": "/t"},
}
"""What stands beside one key in its mapping instead."""
for _section in ("secrets", "configs"):
    for _source in ("file", "content", "environment", "driver", "external"):
        BESIDE[f"{_section}.{_source}"] = {}
JOINED = {"env_file", "label_file", "extends", "profiles"}
"""Keys that are read when files are joined (``skep/stack/compose/loading.py``)."""
AS_IT_IS = {
    "services.links[]": "services on one network reach each other by name",
    "services.pull_policy": "a registry is asked at each deploy, and nodes get what it named",
    "services.gpus[].capabilities[]": "a GPU is all that a device may be",
    "services.deploy.resources.reservations.devices[].capabilities": "a GPU is all that a device may be",
    "networks.enable_ipv4": "every network has it",
}
"""What says nothing but what is so in any case."""


def steps_of(form: Any) -> list[str]:
    """The keys down to a leaf, ``[]`` for a list."""
    made: list[str] = []
    while isinstance(form, dict | list) and form:
        key = next(iter(form)) if isinstance(form, dict) else "[]"
        made.append(key)
        form = form[key] if isinstance(form, dict) else form[0]
    return made


def document_of(section: str, steps: list[str], value: Any) -> dict[str, Any]:
    """A document with ``value`` at ``steps`` of an object ``one`` of ``section``; None: without the last key."""
    made: dict[str, Any] = {
        "services": {"other": {"image": "o"}, "name": {"image": "n"}},
        "networks": {"name": {}, "a": {}},
        "volumes": {"v": {}},
        "secrets": {"s": {"external": "true"}},
        "configs": {"c": {"external": "true"}},
    }
    last = max(at for at, step in enumerate(steps) if step != "[]")
    path, at = section, dict(beside(section, steps[0]))
    made[section]["one"] = at
    if section != "services":
        used = "one:/x" if section == "volumes" else "one"
        made["services"]["other"][section] = [used]
    for number, step in enumerate(steps[:last]):
        path += step if step == "[]" else f".{step}"
        below: Any = [] if steps[number + 1] == "[]" else dict(beside(path, steps[number + 1]))
        if isinstance(at, list):
            at.append(below)
        else:
            at[step] = below
        at = below
    if value == ABSENT:
        at.pop(steps[last], None)
    else:
        at[steps[last]] = value if steps[-1] != "[]" else [value]
    return made


ABSENT = "absent"


def beside(path: str, key: str) -> dict[str, Any]:
    return BESIDE.get(f"{path}.{key}", CONTENTS.get(path, {}))


def stack_from(section: str, document: dict[str, Any]) -> tuple[str, ProblemReport]:
    """All that a stack asks for, without places; and what is said of the document."""
    report = ProblemReport()
    made = stack_of(canonical(node(document)), "s", {(section, "one"): b"x"}, report)
    return repr(to_builtins(made, enc_hook=bytes.hex)), report


def fate_of(section: str, steps: list[str]) -> str:
    """What becomes of a key: it has an ``effect``, one by a label (``skep.devices``), is ``refused`` or ``warned`` of.

    Else it says what is wrong.  A key that is refused gets one answer for every text, whatever the text says.
    """
    without, report = stack_from(section, document_of(section, steps, ABSENT))
    is_needed = bool(report.problems)
    reasons: set[str] = set()
    found = ""
    for value in (*CANDIDATES, None) if steps[-1] == "name" else CANDIDATES:
        made, report = stack_from(section, document_of(section, steps, value))
        if report.problems:
            reasons |= {one.text for one in report.problems}
        elif made != without or is_needed:
            labels = sorted(set(LABEL.findall(made)) - set(LABEL.findall(without)))
            return ", ".join(labels) or "effect"
        else:
            found = "warned" if report.warnings else found or "dropped without a word"
    answers = {text for text in reasons if not text.startswith("expected ")}
    return found or ("refused" if len(answers) == 1 else f"takes none of the candidates: {sorted(reasons)}")


@cache
def fates_of(section: str) -> dict[str, str]:
    """What becomes of each key of a section."""
    definition = {"services": "service"}.get(section, section.removesuffix("s"))
    forms = Sampler(schema()).forms({"$ref": f"#/definitions/{definition}"})
    return {
        f"{section}{paths_of(form)}": "effect"
        if steps_of(form)[0] in JOINED
        else fate_of(section, steps_of(form))
        for form in forms
    }


@pytest.mark.parametrize("section", SECTIONS)
def test_no_key_of_the_schema_is_dropped_without_a_word(section: str) -> None:
    known = ("effect", "refused", "warned")
    wrong = {
        key: fate
        for key, fate in fates_of(section).items()
        if fate not in known and not fate.startswith("skep.")
    }
    assert wrong == {key: "dropped without a word" for key in AS_IT_IS if key.startswith(section)}


def outcomes() -> Iterator[tuple[str, str]]:
    """The rows of the page about compatibility: each key, and what becomes of it."""
    words = {"effect": "works", "refused": "refused, by name", "warned": "no effect, with a warning"}
    for section in SECTIONS:
        for key, fate in sorted(fates_of(section).items()):
            said = f"works: {AS_IT_IS[key]}" if key in AS_IT_IS else words.get(fate)
            yield (
                f"`{key}`",
                said or "works, by the label " + ", ".join(f"`{one}`" for one in fate.split(", ")),
            )


def test_the_page_of_compatibility_has_every_key_with_what_becomes_of_it() -> None:
    assert rows_on_the_page() == list(outcomes()), "python -m docs.reference.compose_keys writes them"


# --- values of wrong types -------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    5, -1, 1e300, True, None, "", "x", "a:b", "9" * 50, [1], [[1]], [None], [""], [{}], [{"a": 1}], {},
    {"": ""}, {"a": None}, {"a": [1]}, {"a": {"b": [1]}}, {"service": [1]}, {"file": {"a": 1}}, {"context": [1]},
    {"external": [1]}, {"path": {"x": 1}},
)  # fmt: skip


def documents_with(value: Any) -> Iterator[dict[str, Any]]:
    """With ``value`` at each key at the top, of each object, and of each group of a service's keys."""
    whole = schema()
    web: dict[str, Any] = {"image": "w"}
    for key in whole["properties"]:
        yield {"services": {"web": web}, key: value}
    for section in ("services", "networks", "volumes", "secrets", "configs"):
        definition = whole["definitions"][{"services": "service"}.get(section, section.removesuffix("s"))]
        yield {"services": {"web": web}, section: {"one": value}}
        for key, below in definition["properties"].items():
            yield {"services": {"web": web}} | {section: {"one": {**beside(section, key), key: value}}}
            groups = [whole["definitions"].get(below.get("$ref", "").rpartition("/")[2], below)]
            groups += groups[0].get("oneOf", ())
            for inner in {name: None for group in groups for name in group.get("properties", {})}:
                yield {"services": {"web": web}} | {
                    section: {"one": {**beside(section, key), key: {inner: value}}}
                }


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_value_of_a_wrong_type_is_a_problem_of_the_file_and_no_other_error(
    value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "compose.yaml"
    for document in documents_with(value):
        file.write_text(json.dumps(document))
        report = ProblemReport()
        try:
            loaded = load([file, file], LoadOptions(environment={}, profiles=("*",)), FileReader(), report)
            stack_of(loaded.document, "s", loaded.contents, report)
        except InvalidArgument:  # Problems are, too
            continue
