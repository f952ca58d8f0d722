"""Placeholders are checked where a service is created."""

import pytest

from skep.errors import InvalidArgument
from skep.manager.control.templates import check_templates
from skep.model.container import ContainerSpec, Mount


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "{{.Service.Name}}-{{ .Task.Slot }}",
        '{{index .Service.Labels "a b"}}',
        "{{- .Node.Platform.OS -}}",
        "}}",
    ],
)
def test_known_placeholders_are_taken(text):
    check_templates(ContainerSpec(hostname=text, env=(f"A={text}",), mounts=(Mount(source=text),)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{.Nosuch}}", "can't evaluate field Nosuch in type \\*template.Context"),
        ("a{{.Node.Nosuch}}", "1:3: executing"),
        ("{{.Node", "unclosed action"),
        ("{{if .Node}}x{{end}}", "only fields and index can be used here"),
        ("\n{{", "expansion:2: unclosed"),
    ],
)
def test_others_are_refused(text, message):
    with pytest.raises(InvalidArgument, match=message):
        check_templates(ContainerSpec(hostname=text))


def test_the_place_is_named():
    with pytest.raises(InvalidArgument, match=r'^expanding env failed: expanding env "A={{x}}": '):
        check_templates(ContainerSpec(env=("A={{x}}",)))
    with pytest.raises(InvalidArgument, match=r'^expanding mounts failed: expanding mount target "{{x}}": '):
        check_templates(ContainerSpec(mounts=(Mount(target="{{x}}"),)))
