"""HAProxy's configuration from the catalog."""

import pytest

from skep.catalog.haproxy import BalancedPort, configuration
from skep.errors import InvalidArgument
from skep.model.catalog import CatalogInstance, CatalogService


@pytest.mark.parametrize(
    ("word", "listener"),
    [
        ("web=8080", BalancedPort("web", "127.0.0.1", 8080)),
        ("web=0.0.0.0:80/http", BalancedPort("web", "0.0.0.0", 80, "http")),
        ("db=[::1]:5432/tcp", BalancedPort("db", "::1", 5432)),
    ],
)
def test_a_listener_is_a_service_at_a_local_address(word: str, listener: BalancedPort) -> None:
    assert BalancedPort.of(word) == listener


@pytest.mark.parametrize(
    "word", ["web", "=80", "web=", "web=0", "web=65536", "web=x:80", "web=80/udp", "a b=80", "web=80\n"]
)
def test_another_word_is_refused_with_the_form(word: str) -> None:
    with pytest.raises(InvalidArgument, match="expected SERVICE="):
        BalancedPort.of(word)


def test_each_listener_has_the_servers_of_its_service() -> None:
    inside = CatalogInstance(id="t1", address="10.0.0.1", port=8080)
    light = CatalogInstance(id="t4", address="10.0.0.4", port=8080, weight=5)
    outside = CatalogInstance(id="db/1", address="fd00::7", port=5432, is_registered=True)
    unpublished = CatalogInstance(id="t2", address="10.1.0.2", port=0)
    impossible = CatalogInstance(id="t3", address="10.0.0.3", port=99_999)
    instances = (inside, light, outside, unpublished, impossible)
    services = {"web": CatalogService(name="web", instances=instances)}
    listeners = [BalancedPort("web", "127.0.0.1", 80, "http"), BalancedPort("none", "127.0.0.1", 81)]
    text = configuration(listeners, services, "/run/admin.sock", "haproxy")
    servers = [line.split() for line in text.splitlines() if line.startswith("    server ")]
    assert servers == [
        ["server", "task-t1", "10.0.0.1:8080", "check"],
        ["server", "task-t4", "10.0.0.4:8080", "check", "weight", "5"],
        ["server", "outside-db-1", "[fd00::7]:5432", "check"],
    ]
    assert text.index("listen web-80") < text.index("server task-t1") < text.index("listen none-81")
    assert "expose-fd listeners" in text
    assert "    user haproxy\n    group haproxy\n" in text
    assert "user" not in configuration(listeners, services, "/run/admin.sock", "")
