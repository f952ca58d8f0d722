import base64
import json

import pytest

from skep.engine.images.platforms import ImagePlatform, choose, parse_platform
from skep.engine.images.registry.credentials import RegistryCredentials, decode_credentials
from skep.engine.images.registry.endpoints import RegistryEndpoint, RegistryPolicy
from skep.engine.images.registry.manifests import Descriptor
from skep.errors import InvalidArgument, NotFound


@pytest.mark.parametrize("domain", ["127.0.0.1:5000", "localhost:5000", "[::1]:5000", "localhost"])
def test_a_registry_on_loopback_may_be_asked_without_tls(domain: str):
    assert [endpoint.url for endpoint in RegistryPolicy().endpoints(domain)] == [
        f"https://{domain}",
        f"http://{domain}",
    ]


def test_any_other_registry_is_asked_with_verified_tls_only():
    assert RegistryPolicy().endpoints("reg.example:5000") == (RegistryEndpoint("https://reg.example:5000"),)


@pytest.mark.parametrize("insecure", ["reg.example:5000", "reg.example"])
def test_a_configured_registry_may_be_asked_without_tls(insecure: str):
    policy = RegistryPolicy(insecure=frozenset({insecure}))
    assert policy.is_insecure("reg.example:5000")
    assert not policy.is_insecure("other.example:5000")


def test_a_configured_network_makes_its_addresses_insecure():
    policy = RegistryPolicy(insecure=frozenset({"10.1.0.0/16"}))
    assert policy.is_insecure("10.1.2.3:5000")
    assert not policy.is_insecure("10.2.2.3:5000")


def test_mirrors_are_asked_before_docker_hub_and_for_nothing_else():
    policy = RegistryPolicy(mirrors=("https://mirror.example/",))
    assert [one.url for one in policy.endpoints("docker.io")] == [
        "https://mirror.example",
        "https://registry-1.docker.io",
    ]
    assert [one.url for one in policy.endpoints("reg.example")] == ["https://reg.example"]


def test_credentials_are_read_as_clients_write_them():
    header = base64.urlsafe_b64encode(b'{"username":"u","password":"p?>","serveraddress":"x"}').decode()
    assert decode_credentials(header) == RegistryCredentials(username="u", password="p?>", server_address="x")
    assert decode_credentials(header.rstrip("=")) == RegistryCredentials(
        username="u", password="p?>", server_address="x"
    )


@pytest.mark.parametrize("name", ["identitytoken", "IdentityToken"])
def test_tokens_are_read_as_clients_write_them(name: str):
    header = base64.urlsafe_b64encode(json.dumps({name: "t", "RegistryToken": "r", "email": None}).encode())
    assert decode_credentials(header.decode()) == RegistryCredentials(identity_token="t", registry_token="r")


@pytest.mark.parametrize("header", ["", "e30=", "%%%", "bm9uc2Vuc2U=", "W10="])
def test_unreadable_credentials_are_none(header: str):
    assert decode_credentials(header) == RegistryCredentials()


def test_a_password_is_not_shown():
    assert "geheim" not in repr(RegistryCredentials(username="u", password="geheim"))


def descriptor(**platform: str) -> Descriptor:
    return Descriptor(digest="sha256:" + platform["architecture"].ljust(64, "0"), size=1, platform=platform)


def test_an_index_gives_the_first_manifest_for_the_platform():
    arm, amd = descriptor(os="linux", architecture="arm64"), descriptor(os="linux", architecture="amd64")
    assert choose((arm, amd), ImagePlatform("linux", "amd64")) is amd


def test_an_index_without_the_platform_is_an_error_that_names_those_offered():
    offered = [
        descriptor(os="linux", architecture="amd64"),
        descriptor(os="linux", architecture="amd64"),
        descriptor(os="linux", architecture="arm64", variant="v8"),
        descriptor(os="unknown", architecture="unknown"),
    ]
    words = "no matching manifest for linux/arm/v7 in the manifest list entries"
    with pytest.raises(NotFound, match=f"^{words}: it has linux/amd64, linux/arm64/v8$"):
        choose(offered, ImagePlatform("linux", "arm", "v7"))
    with pytest.raises(NotFound, match=f"^{words}$"):
        choose((), ImagePlatform("linux", "arm", "v7"))
    many = [descriptor(os="linux", architecture=f"a{number}") for number in range(1000)]
    with pytest.raises(NotFound, match=r"linux/a15 and 984 more$"):
        choose(many, ImagePlatform("linux", "arm", "v7"))


def test_platforms_are_written_with_one_to_three_parts():
    assert parse_platform("linux/arm/v7") == ImagePlatform("linux", "arm", "v7")
    assert parse_platform("LINUX/amd64") == ImagePlatform("linux", "amd64")
    for text in ("a/b/c/d", "linux//", "/"):
        with pytest.raises(InvalidArgument):
            parse_platform(text)
