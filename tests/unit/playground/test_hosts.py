"""Where a node of a playground serves its API: at its own sockets, and at the hosts of its file."""

import ssl
from pathlib import Path

from msgspec.structs import replace

from skep.configuration.configuration import TcpHost
from skep.configuration.sources import load, parse_arguments
from skep.playground import tls
from skep.playground.description import PlaygroundDescription
from skep.playground.node import daemon_command, further_hosts
from tests.unit.playground.test_relay import a_node

OWN = ("unix:///own.sock",)


def hosts_of(directory: Path, content: str) -> list[str]:
    file = directory / "skep.toml"
    file.write_text(content)
    return list(further_hosts(file, OWN))


def test_the_hosts_of_a_nodes_file_are_served_beside_its_own(tmp_path: Path) -> None:
    assert hosts_of(tmp_path, 'hosts = ["unix:///own.sock", "tcp://0.0.0.0:2376"]') == ["tcp://0.0.0.0:2376"]
    assert hosts_of(tmp_path, 'hosts = "unix:///x"') == ["unix:///x"]
    for nothing in ("", "hosts = 3", "hosts = [", 'other = ["a"]'):
        assert hosts_of(tmp_path, nothing) == []


def test_a_manager_with_tls_serves_its_api_to_clients_that_verify_it(tmp_path: Path) -> None:
    node = replace(a_node("m1", "192.168.100.11"), state_dir=str(tmp_path / "data"), cgroup="p-m1")
    tls.write(tmp_path, PlaygroundDescription(name="p", nodes=(node,), tls=True))
    command = daemon_command(tmp_path / "m1", node)
    configuration = load(parse_arguments(command[2:])).configuration
    assert TcpHost("0.0.0.0", tls.PORT) in configuration.api_hosts
    assert configuration.tls_ca == tls.authority_file(tmp_path)
    assert oct((tmp_path / "m1" / "server-key.pem").stat().st_mode & 0o777) == "0o600"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "m1" / "server.pem", tmp_path / "m1" / "server-key.pem")
    for name in ("127.0.0.1", "localhost", "m1", "192.168.100.11"):
        client = ssl.create_default_context(cafile=str(tls.authority_file(tmp_path)))
        client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default since Python 3.13
        assert shake_hands(client, server, name)


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> bool:
    """Whether the client trusts the server under this name, in memory."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].version() is not None
