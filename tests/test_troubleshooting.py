"""Every alert, node condition and refusal of the scheduler has an entry on the page of symptoms."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from skep.model.node_reports.conditions import ConditionName
from skep.model.node_reports.node_refusals import NodeRefusal
from tests.support.harness.documents import ROOT, headings, quoted
from tests.support.telemetry.prometheus_rig import RULES

PAGE = ROOT / "docs/guide/troubleshooting.md"


def packaged() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def entries(section: str) -> dict[str, str]:
    """The texts of a section's entries by their headings."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    _, *found = re.split(r"^### (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def test_the_table_of_symptoms_leads_to_every_entry_about_one() -> None:
    page = PAGE.read_text()
    table = page[page.index("## Find your symptom") : page.index("## Services and tasks")]
    linked = set(re.findall(r"\]\(#([^)]+)\)", table))
    symptoms = page[page.index("## Services and tasks") : page.index("## Node conditions")]
    entries = {
        re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-")
        for one in re.findall(r"^### (.*)$", symptoms, re.M)
    }
    assert linked == entries | {"node-conditions", "alerts"}


def test_every_alert_has_its_entry() -> None:
    assert list(entries("Alerts")) == [rule["alert"] for rule in packaged()]


def test_every_condition_of_a_node_has_its_entry() -> None:
    assert list(entries("Node conditions")) == sorted(ConditionName)


@pytest.mark.parametrize("section", ["Alerts", "Node conditions"])
def test_an_entry_says_what_it_means_and_what_to_do(section: str) -> None:
    assert [name for name, text in entries(section).items() if len(text.split()) < 8] == []


@pytest.mark.parametrize("rule", packaged(), ids=lambda rule: rule["alert"])
def test_a_runbook_is_the_alerts_own_entry(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert ROOT / page == PAGE
    assert anchor == rule["alert"].lower()
    assert anchor in headings(PAGE)


def test_every_reason_why_no_node_fits_is_explained() -> None:
    named = quoted(PAGE)
    missing = [one for one in NodeRefusal if not any(word in one.value for word in named if len(word) > 8)]
    assert missing == []


def test_a_page_has_one_heading_of_a_name() -> None:
    """Otherwise an address leads to the first of them."""
    for page in (PAGE, *sorted(Path(ROOT / "docs/guide").glob("*.md"))):
        found = sorted(re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE))
        assert [one for one, other in pairwise(found) if one.lower() == other.lower()] == [], page
