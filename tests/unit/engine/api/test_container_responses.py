"""How containers are rendered for the Engine API."""

from skep.engine.api.container_responses import extra_hosts


def test_extra_hosts_are_names_with_their_address() -> None:
    assert extra_hosts(["1.2.3.4 extra", "fd00::1 a b"]) == ["extra:1.2.3.4", "a:fd00::1", "b:fd00::1"]
