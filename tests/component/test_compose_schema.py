"""No key of the published Compose schema is unknown: it is honoured, refused by name, or said to have no effect.

The schema is the one that Compose's own program has in it.
"""

import json
from typing import Any

import pytest

from skep.stack.conversion import stack_of
from skep.stack.document import Node, Place, mapping, scalar
from skep.stack.merging import canonical
from skep.stack.reading import Report
from tests.support.plugins import plugin

PLACE = Place("f", 1, 1)


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


def node(value: Any) -> Node:
    if isinstance(value, dict):
        return mapping({key: node(one) for key, one in value.items()}, PLACE)
    if isinstance(value, list):
        return Node(tuple(map(node, value)), PLACE)
    return scalar(value, PLACE)


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


@pytest.mark.parametrize("section", ["services", "networks", "volumes", "secrets", "configs"])
def test_no_key_of_the_schema_is_unknown(section: str) -> None:
    whole = schema()
    definition = {"services": "service"}.get(section, section.removesuffix("s"))
    forms = Sampler(whole).forms({"$ref": f"#/definitions/{definition}"})
    assert len(forms) > 5
    unknown: list[str] = []
    for form in forms:
        text = {"services": {"w": {"image": "w"}}} | {section: {"one": form}}
        report = Report()
        stack_of(canonical(node(text)), "s", {}, report)
        if any("this key is not known" in one.text for one in report.problems):
            unknown.append(paths_of(form))
    assert unknown == []


def test_no_section_of_the_schema_is_unknown() -> None:
    for section in schema()["properties"]:
        report = Report()
        stack_of(canonical(node({"services": {"w": {"image": "w"}}, section: {}})), "s", {}, report)
        assert not any("this key is not known" in one.text for one in report.problems), section
