"""Which node a command talks to, in docker's order."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skep.api.client.ssh import SshDestination
from skep.cli.endpoint import DEFAULT_HOST, HostOptions
from skep.errors import InvalidArgument


def options(home: Path, host: str = "", context: str = "", **environment: str) -> HostOptions:
    return HostOptions(host=host, context=context, environment=environment, home=home)


def a_context(home: Path, name: str, host: str, **docker: Any) -> Path:
    """A context as the docker command stores it; gives the directory for its certificates."""
    id = hashlib.sha256(name.encode()).hexdigest()
    meta = home / ".docker/contexts/meta" / id
    meta.mkdir(parents=True)
    described = {"Name": name, "Metadata": {}, "Endpoints": {"docker": {"Host": host, **docker}}}
    (meta / "meta.json").write_bytes(msgspec.json.encode(described))
    return home / ".docker/contexts/tls" / id / "docker"


def use(home: Path, name: str) -> None:
    (home / ".docker").mkdir(exist_ok=True)
    (home / ".docker/config.json").write_text(f'{{"currentContext": "{name}", "auths": {{}}}}')


def test_without_anything_it_is_this_machine(tmp_path: Path) -> None:
    endpoint = options(tmp_path).endpoint()
    assert (endpoint.host, endpoint.docker_flags) == (DEFAULT_HOST, ("--host", DEFAULT_HOST))


def test_the_context_in_use_counts_when_nothing_else_is_said(tmp_path: Path) -> None:
    a_context(tmp_path, "hive", "unix:///hive.sock")
    a_context(tmp_path, "other", "unix:///other.sock")
    use(tmp_path, "hive")
    assert options(tmp_path).endpoint().host == "unix:///hive.sock"
    assert options(tmp_path).endpoint().docker_flags == ("--context", "hive")
    assert options(tmp_path, DOCKER_CONTEXT="other").endpoint().host == "unix:///other.sock"
    assert options(tmp_path, DOCKER_CONTEXT="default").endpoint().host == DEFAULT_HOST
    assert options(tmp_path, DOCKER_CONTEXT="other", DOCKER_HOST="tcp://a:1").endpoint().host == "tcp://a:1"
    assert options(tmp_path, DOCKER_HOST="tcp://a:1", SKEP_HOST="tcp://b:1").endpoint().host == "tcp://b:1"
    assert options(tmp_path, context="other", DOCKER_HOST="tcp://a:1").endpoint().host == "unix:///other.sock"
    assert options(tmp_path, host="tcp://c:1", DOCKER_HOST="tcp://a:1").endpoint().host == "tcp://c:1"


def test_the_configuration_may_lie_elsewhere(tmp_path: Path) -> None:
    a_context(tmp_path, "hive", "unix:///hive.sock")
    there = options(Path("/nonexistent"), context="hive", DOCKER_CONFIG=str(tmp_path / ".docker"))
    assert there.endpoint().host == "unix:///hive.sock"


def test_certificates_come_with_the_context_or_with_the_environment(tmp_path: Path) -> None:
    certificates = a_context(tmp_path, "far", "tcp://far:2376", SkipTLSVerify=True)
    certificates.mkdir(parents=True)
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (certificates / name).touch()
    tls = options(tmp_path, context="far").endpoint().tls
    assert tls is not None
    assert (tls.ca, tls.certificate, tls.key) == tuple(
        certificates / name for name in ("ca.pem", "cert.pem", "key.pem")
    )
    assert tls.skips_verification
    by_environment = options(
        tmp_path, DOCKER_HOST="tcp://far:2376", DOCKER_TLS_VERIFY="1", DOCKER_CERT_PATH=str(certificates)
    )
    tls = by_environment.endpoint().tls
    assert tls is not None
    assert not tls.skips_verification
    assert tls.ca == certificates / "ca.pem"
    with pytest.raises(InvalidArgument, match="certificates for tcp://far:2376 cannot be used"):
        by_environment.client()


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"host": "unix:///a", "context": "b"}, "either specify --host or --context"),
        ({"context": "nowhere"}, 'context "nowhere" is not in'),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, written: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        options(tmp_path, **written).endpoint()


@pytest.mark.parametrize("content", ["{", "[]", '{"Endpoints": {}}', '{"Endpoints": {"docker": 3}}'])
def test_a_damaged_context_is_refused(tmp_path: Path, content: str) -> None:
    a_context(tmp_path, "hive", "unix:///hive.sock")
    (meta,) = tmp_path.glob(".docker/contexts/meta/*/meta.json")
    meta.write_text(content)
    with pytest.raises(InvalidArgument):
        options(tmp_path, context="hive").endpoint()


@pytest.mark.parametrize(
    "host",
    ["tcp://x:99999", "tcp://x:port", "tcp://", "unix://", "http:", "nonsense", "ssh://", "ssh://a:b@c", ""],
)
def test_a_host_that_is_none_is_refused_in_a_sentence(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidArgument, match="unable to parse docker host"):
        HostOptions(environment={"DOCKER_HOST": host or "://"}, home=tmp_path).client()


def test_the_address_determines_the_arguments_of_ssh() -> None:
    destination = SshDestination.of("ssh://me@bee:2222/run/other.sock")
    words = destination.command(Path("/tmp/x/api.sock"))
    assert words[-2:] == ["--", "bee"]
    assert words[words.index("-l") + 1] == "me"
    assert words[words.index("-p") + 1] == "2222"
    assert words[words.index("-L") + 1] == "/tmp/x/api.sock:/run/other.sock"
    assert SshDestination.of("ssh://bee").socket == "/run/skep/skep.sock"
