"""How containers are rendered for the Engine API."""

from skep.engine.api.responses.container_responses import config_of, extra_hosts
from skep.engine.containers.container import ContainerConfig
from tests.support.engine.stub_engine import a_container


def test_extra_hosts_are_names_with_their_address() -> None:
    assert extra_hosts(["1.2.3.4 extra", "fd00::1 a b"]) == ["extra:1.2.3.4", "a:fd00::1", "b:fd00::1"]


def test_the_time_for_a_stop_is_shown_where_it_was_given() -> None:
    for given in (None, 0, -1):
        shown = config_of(a_container(config=ContainerConfig(path="sh", stop_timeout=given)))
        assert shown.get("StopTimeout") == given
    assert "StopTimeout" not in config_of(a_container())
