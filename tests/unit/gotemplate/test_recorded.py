"""Templates give what they gave in a real Docker Engine: output, or error."""

import json
from pathlib import Path

import pytest

from skep.gotemplate import Struct, TemplateError, expand
from skep.model.options import templates
from tests.conformance.templates import LABELS, SERVICE, TEMPLATES

RECORDED = Path(__file__).parents[2] / "conformance/recorded/templates.json"
LATER = frozenset({"{{with 1}}{{.}}{{else with 2}}{{.}}{{end}}"})
"""What Go has taken only since the recorded engine was built."""


def task(name: str, labels: dict[str, str], os: str) -> Struct:
    return templates.context(
        service_id="serviceid",
        service_name=name,
        service_labels=labels,
        node_id="nodeid",
        hostname="nodeHostname",
        os=os,
        architecture="architecture",
        task_id="",
        task_name="",
        slot="1",
    )


TRIED = task("servicename", {}, "os")
"""The task that an engine tries a service's placeholders with."""
STARTED = task(SERVICE, LABELS, "linux")


@pytest.mark.parametrize("text", [text for text in TEMPLATES if text not in LATER])
def test_a_template_gives_what_it_gave_in_an_engine(text):
    recorded = json.loads(RECORDED.read_text())["templates"][text]
    if "error" in recorded:
        with pytest.raises(TemplateError) as refused:
            expand(text, TRIED)
        assert recorded["error"].endswith(f": {refused.value}")
    else:
        assert expand(text, STARTED) == recorded["output"]


def test_every_template_is_recorded():
    assert set(json.loads(RECORDED.read_text())["templates"]) == set(TEMPLATES)


def test_a_with_may_have_an_else_with():
    assert expand('{{with ""}}a{{else with .Service}}{{.Name}}{{end}}', STARTED) == "web"
