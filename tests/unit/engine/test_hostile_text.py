"""Numbers without end, zero bytes and nested lists: refused, or taken for nothing, and never a failure of ours."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from skep.api.formats.gosyntax import parse_size
from skep.engine.api.builds import _credentials
from skep.engine.buildkit.routes import _json, _Output
from skep.engine.confinement import seccomp
from skep.engine.confinement.machine import device_rule
from skep.engine.images.registry.credentials import RegistryCredentials, decode_credentials
from skep.engine.images.registry.endpoints import RegistryPolicy
from skep.engine.log_drivers.transport import host_and_port
from skep.engine.volumes.volumes import Volumes
from skep.errors import InvalidArgument, SkepError
from tests.unit.engine.test_create import configured

DIGITS = "9" * 5000  # int() takes 4300, and a float ends at 10**308
DEEP = "[" * 1_000_000 + "]" * 1_000_000  # Python 3.14 limits the bytes of the stack, not the depth


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (parse_size, DIGITS),
        (parse_size, "9999999999999g"),
        (parse_size, "٣m"),
        (lambda text: host_and_port(text, None), f"logs:{DIGITS}"),
        (lambda text: _json({"outputs": text}, "outputs", list[_Output]), f'[{{"a": {DEEP}}}]'),
        (lambda text: _json({"outputs": text}, "outputs", list[_Output]), "[\udcff"),
        (device_rule, f"c {DIGITS}:1 rwm"),
        (device_rule, f"c 1:{DIGITS} rwm"),
        (lambda text: seccomp.custom(text.encode(), ()), DEEP),
        (lambda text: seccomp.custom(text.encode(), ()), f'{{"a": {DEEP}}}'),
        (lambda text: configured(host={"PortBindings": {"80/tcp": [{"HostPort": text}]}}), DIGITS),
        (lambda text: configured(host={"PortBindings": {"80/tcp": [{"HostPort": text}]}}), "²"),
        (lambda text: configured(host={"PortBindings": {"80/tcp": [{"HostPort": text}]}}), "65536"),
    ],
)
def test_what_is_no_number_of_this_world_is_refused(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(InvalidArgument):
        read(text)


@pytest.mark.parametrize(
    "header", ["\udcff", "²", "A", encoded(DEEP), encoded(json.dumps({"a": 1})[:-1] + f', "b": {DEEP}}}')]
)
def test_credentials_that_cannot_be_read_are_none(header: str) -> None:
    assert decode_credentials(header) == RegistryCredentials()
    assert _credentials(header) == {}


def test_nested_credentials_of_a_registry_are_none() -> None:
    assert _credentials(encoded(f'{{"a": {{"b": {DEEP}}}}}')) == {}


@pytest.mark.parametrize("domain", [f"localhost:{DIGITS}", "a.b:65536", "a.b:²", "[::1]:99999"])
def test_a_registry_at_no_port_is_an_error_of_the_registry(domain: str) -> None:
    with pytest.raises(SkepError, match=r"dial tcp: address .*: invalid port"):
        RegistryPolicy().endpoints(domain)


@pytest.mark.parametrize("domain", ["localhost:5000", "a.b", "[::1]", "[::1]:5000", "a.b:65535"])
def test_other_registries_have_an_address(domain: str) -> None:
    assert RegistryPolicy().endpoints(domain)[0].url == f"https://{domain}"


def test_no_volume_has_a_zero_byte_in_its_name(tmp_path: Path) -> None:
    assert not Volumes(tmp_path).has("a\0b")
