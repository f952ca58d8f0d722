"""What follows the end of a plain container."""

from skep.engine.containers.container import PlainOptions, RestartPolicy
from skep.engine.lifecycle.restart import (
    LASTED_S,
    LONGEST_DELAY_S,
    RemoveEnded,
    RestartContainer,
    StayEnded,
    after_end,
    after_node_restart,
)


def plain(policy: str, *, attempts_max: int = 0, restarts: int = 0, is_stopped: bool = False) -> PlainOptions:
    restart = RestartPolicy(name=policy, attempts_max=attempts_max)
    return PlainOptions(restart=restart, restarts=restarts, is_stopped=is_stopped)


def test_each_policy_restarts_what_it_is_for() -> None:
    assert after_end(plain("no"), 1, 1.0) == StayEnded()
    assert after_end(plain("always"), 0, 1.0) == RestartContainer(0.1)
    assert after_end(plain("on-failure"), 0, 1.0) == StayEnded()
    assert after_end(plain("on-failure"), 1, 1.0) == RestartContainer(0.1)
    assert after_end(plain("on-failure", attempts_max=2, restarts=2), 1, 1.0) == StayEnded()
    for policy in ("always", "unless-stopped", "on-failure"):
        assert after_end(plain(policy, is_stopped=True), 1, 1.0) == StayEnded()


def test_a_crash_loop_is_slowed_down_and_a_long_life_forgives() -> None:
    assert after_end(plain("always"), 1, 1.0, 0.1) == RestartContainer(0.2)
    assert after_end(plain("always"), 1, 1.0, 50.0) == RestartContainer(LONGEST_DELAY_S)
    assert after_end(plain("always"), 1, LASTED_S, 50.0) == RestartContainer(0.1)


def test_a_container_with_auto_remove_is_removed_at_its_end() -> None:
    assert after_end(PlainOptions(auto_remove=True, is_stopped=True), 0, 1.0) == RemoveEnded()


def test_after_a_crash_of_the_machine_always_means_always() -> None:
    stopped = plain("always", is_stopped=True)
    assert after_node_restart(stopped, 0, was_started=True) == RestartContainer(0.0, ignore_stop=True)
    assert after_node_restart(plain("always"), 0, was_started=True) == RestartContainer(0.0)
    assert after_node_restart(stopped, 0, was_started=False) == StayEnded()
    assert after_node_restart(plain("unless-stopped", is_stopped=True), 0, was_started=True) == StayEnded()
    assert after_node_restart(PlainOptions(auto_remove=True), 0, was_started=True) == RemoveEnded()
