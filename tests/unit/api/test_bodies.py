"""JSON from clients becomes Structs by Go's rules."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.api.formats.bodies import decode_body
from skep.engine.containers.request import CreateRequest, HostConfig
from skep.errors import InvalidArgument
from skep.model.network import Network
from skep.model.secret import ConfigSpec
from skep.model.service import PublishMode, Service, ServiceSpec
from skep.model.swarm import SwarmSpec
from skep.model.task import Task
from skep.model.values.encoding import to_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def test_null_means_missing():
    spec = decode_body(
        b'{"Name": null, "Labels": null, "TaskTemplate": {"ContainerSpec": null}}', ServiceSpec
    )
    assert spec == ServiceSpec()


def test_null_in_a_list_or_map_is_the_zero_value():
    body = b'{"Labels": {"a": null}, "TaskTemplate": {"ContainerSpec": {"Args": ["x", null]}}}'
    spec = decode_body(body, ServiceSpec)
    assert spec.labels == {"a": ""}
    assert spec.task_template.container_spec.args == ("x", "")


def test_names_match_without_regard_to_case():
    assert decode_body(b'{"nAmE": "web"}', ServiceSpec).name == "web"


@pytest.mark.parametrize(
    ("body", "cmd", "entrypoint"),
    [
        (b'{"Cmd": "echo a b", "Entrypoint": ""}', ("echo a b",), ("",)),
        (b'{"Cmd": ["a", "b"], "Entrypoint": null}', ("a", "b"), None),
        (b'{"cmd": [], "entrypoint": "x"}', (), ("x",)),
    ],
)
def test_a_command_may_be_one_string(body, cmd, entrypoint):
    """As Docker Engine 20.10 and 28.5 read it."""
    request = decode_body(body, CreateRequest)
    assert (request.cmd, request.entrypoint) == (cmd, entrypoint)
    assert decode_body(b'{"CapAdd": "NET_ADMIN"}', HostConfig).cap_add == ("NET_ADMIN",)
    with pytest.raises(InvalidArgument, match=r"cannot unmarshal string .* of type \[\]string"):
        decode_body(b'{"Env": "A=1"}', CreateRequest)


def test_unknown_fields_are_ignored():
    assert decode_body(b'{"Bogus": [1, {"x": 2}], "Name": "web"}', ServiceSpec).name == "web"


def test_bytes_that_are_no_text_become_replacement_characters():
    assert decode_body(b'{"Name": "a\xff"}', ServiceSpec).name == "a�"


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    assert decode_body(b'{"Name": "a\\ud800"}', ServiceSpec).name == "a�"


@pytest.mark.parametrize("depth", [200, 900, 1_100, 5_000, 9_990])
def test_nesting_is_no_danger(depth):
    nested = b"[" * depth + b"]" * depth
    for body in (
        b'{"Bogus": ' + nested + b"}",
        b'{"Bogus": ' + nested + b"} x",
        b'{"Bogus": ' + nested + b', "Name": "\xff"}',
    ):
        with suppress(InvalidArgument):
            decode_body(body, ServiceSpec)


def test_data_are_base64_with_line_breaks():
    assert decode_body(b'{"Data": "aGVs\\nbG8="}', ConfigSpec).data == b"hello"


def test_the_first_of_two_errors_is_reported():
    with pytest.raises(InvalidArgument, match=r"ServiceSpec\.Name of type string"):
        decode_body(b'{"Name": 1, "Labels": 2}', ServiceSpec)


def test_a_strange_word_can_mean_a_known_one():
    body = b'{"EndpointSpec": {"Ports": [{"PublishMode": "magic"}]}}'
    spec = decode_body(body, ServiceSpec, unrecognized={PublishMode: lambda _: PublishMode.INGRESS})
    assert spec.endpoint_spec.ports[0].publish_mode is PublishMode.INGRESS


@pytest.mark.parametrize("type_", [ServiceSpec, SwarmSpec, ConfigSpec])
@given(value=json_values)
def test_anything_is_decoded_or_refused(type_, value):
    with suppress(InvalidArgument):
        assert isinstance(decode_body(to_json(value), type_), type_)


@pytest.mark.parametrize("type_", [Service, Task, Network])
def test_our_own_json_is_read_back_unchanged(type_):
    value = type_(id="x")
    assert decode_body(to_json(value), type_) == value
