"""Placeholders of services, and templated secrets and configs."""

import pytest

from skep.errors import InvalidArgument, NotFound
from skep.gotemplate import TemplateError
from skep.model.container import ContainerSpec, Mount, VolumeOptions
from skep.model.options import templates
from skep.model.values.meta import Driver

SEEN = templates.context(
    service_id="s1",
    service_name="web",
    service_labels={"a b": "front"},
    node_id="n1",
    hostname="host",
    os="linux",
    architecture="arm64",
    task_id="t1",
    task_name="web.3.t1",
    slot="3",
)


def test_environment_mounts_and_hostname_are_expanded():
    options = VolumeOptions(
        labels={"of": "{{.Service.Name}}"}, driver_config=Driver(name="local", options={"o": "{{.Node.ID}}"})
    )
    mount = Mount(source="{{.Task.Slot}}", target="/{{.Service.Name}}", volume_options=options)
    found = templates.expand_container(
        ContainerSpec(
            hostname='{{index .Service.Labels "a b"}}',
            env=(
                "A={{.Node.Hostname}}",
                "{{.Service.Name}}={{if eq .Task.Slot `3`}}third{{end}}",
                "{{.Rubbish}}",
            ),
            mounts=(mount,),
            dir="{{.Service.Name}}",
        ),
        SEEN,
    )
    assert found.hostname == "front"
    assert found.env == ("A=host", "{{.Service.Name}}=third", "{{.Rubbish}}")
    assert (found.mounts[0].source, found.mounts[0].target) == ("3", "/web")
    assert found.mounts[0].volume_options == VolumeOptions(
        labels={"of": "web"}, driver_config=Driver(name="local", options={"o": "n1"})
    )
    assert found.dir == "{{.Service.Name}}"


@pytest.mark.parametrize(
    ("container", "message"),
    [
        (ContainerSpec(env=("A={{x}}",)), 'expanding env failed: expanding env "A={{x}}": template: '),
        (
            ContainerSpec(hostname="{{.Rubbish}}"),
            "expanding hostname failed: template: expansion:1:2: executing ",
        ),
        (
            ContainerSpec(mounts=(Mount(target="{{x}}"),)),
            'expanding mounts failed: expanding mount target "{{x}}": template: ',
        ),
        (
            ContainerSpec(mounts=(Mount(volume_options=VolumeOptions(labels={"a": "{{x}}"})),)),
            'expanding mounts failed: expanding volume labels: expanding map entry "a"="{{x}}": template: ',
        ),
    ],
)
def test_the_error_names_what_failed(container, message):
    with pytest.raises(InvalidArgument) as refused:
        templates.expand_container(container, SEEN)
    assert str(refused.value).startswith(message)


def test_all_placeholders_of_a_container_share_what_they_may_cost():
    greedy = "A={{range 9000}}{{end}}"
    templates.expand_container(ContainerSpec(env=(greedy,)), SEEN)
    with pytest.raises(InvalidArgument, match="too many steps"):
        templates.expand_container(ContainerSpec(env=(greedy,) * 4), SEEN)


def secret(name):
    if name != "key":
        raise NotFound(f"secret target {name} not found")
    return "hu\udcffsh"


def payload(data):
    return templates.expand_payload(data, SEEN, ("WHO=web", "EMPTY"), secret, lambda name: f"config {name}")


def test_a_payload_sees_the_task_its_environment_secrets_and_configs():
    text = (
        b'{{.Service.Name}} {{env "WHO"}}{{env "EMPTY"}}{{env "none"}} {{secret "key"}} {{config "x"}} \xfe'
    )
    assert payload(text) == b"web web hu\xffsh config x \xfe"


def test_what_a_payload_cannot_have_is_its_error():
    with pytest.raises(
        TemplateError, match=r'at <secret "none">: error calling secret: secret target none not found'
    ):
        payload(b'{{secret "none"}}')
    with pytest.raises(TemplateError, match=r"type \*template\.PayloadContext"):
        payload(b"{{.Rubbish}}")
