"""The table of a container's life: its drawing in the documents, and properties that every rule has."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from skep.engine.containers.container import ContainerState, Health, HealthStatus, PlainOptions, RestartPolicy
from skep.engine.lifecycle import life_events, machine
from skep.engine.lifecycle.driver import LifecycleDriver
from skep.engine.lifecycle.effects import Effects
from skep.engine.lifecycle.life_events import EffectFailed, LifeEvent
from skep.engine.lifecycle.machine import BEST_EFFORT, INTERRUPTIBLE, TABLE, Effect, LifeRule, Saving, State
from skep.model.networks.sandbox import EndpointRequest
from tests.support.engine.stub_engine import StubEngine, a_container, a_process, on_virtual_time

PAGE = Path(__file__).parents[3] / "docs" / "design" / "runtime.md"


def words(name: str) -> str:
    """Return ``run ended`` for ``RunEnded``."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()


def states(rule: LifeRule) -> str:
    return "any" if rule.states == machine.ANY else ", ".join(state.value for state in rule.states)


def drawn_table() -> str:
    """Return the table as the page has it."""
    lines = ["| in | event | record | effects | then, or on failure |", "|---|---|---|---|---|"]
    for rule in TABLE:
        condition = f", {rule.when.__doc__}" if rule.when is not None else ""
        changes = [f"**{rule.to.value}**"] if rule.to is not None else []
        changes += [rule.record.__doc__ or ""] if rule.record is not None else []
        changes += ["refused"] if rule.refusal is not None else []
        following = [words(rule.then.__name__)] if rule.then is not None else []
        following += [f"*{words(rule.fails.__name__)}*"] if rule.fails is not None else []
        cells = (
            states(rule),
            words(rule.event.__name__) + condition,
            ", ".join(changes),
            ", ".join(effect.value for effect in rule.effects),
            ", ".join(following),
        )
        lines.append("".join(f"| {cell} " if cell else "| " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def drawn_picture() -> str:
    """Return the changes of state as the page has them."""
    lines = ["    [*] --> created"]
    for rule in TABLE:
        for state in rule.states if rule.to is not None else ():
            assert rule.to is not None
            if state is not rule.to:
                lines.append(f"    {state.value} --> {rule.to.value} : {words(rule.event.__name__)}")
    return "\n".join([*dict.fromkeys(lines), "    removing --> [*] : discarded"]) + "\n"


def test_the_page_shows_the_table() -> None:
    assert drawn_table() in PAGE.read_text()


def test_the_page_shows_the_changes_of_state() -> None:
    assert f"```mermaid\nstateDiagram-v2\n{drawn_picture()}```" in PAGE.read_text()


def event_of(kind: type[LifeEvent]) -> LifeEvent:
    """Return an event, whatever its fields are."""
    fields: dict[str, Any] = {
        "process": a_process(),
        "monitor": a_process(),
        "number": 9,
        "at": "2026-01-01T00:00:00Z",
        "reason": "no",
        "exit_code": 1,
        "sandbox": None,
        "warnings": (),
        "word": "c",
        "change": lambda one: one,
        "request": EndpointRequest(network="front"),
        "network": "front",
        "name": "other",
        "health": Health(),
    }
    return kind(**{name: fields[name] for name in kind.__struct_fields__ if name in fields})


REQUESTS = (
    *(life_events.UserStarts, life_events.UserStops, life_events.Start, life_events.Pause),
    *(life_events.Unpause, life_events.Retire, life_events.RemoveContainer, life_events.Adopted),
    *(life_events.Exec, life_events.Update, life_events.Rename, life_events.Signal, life_events.Probed),
)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("change", [life_events.Connect, life_events.Disconnect])
def test_a_change_of_networks_has_a_rule_in_every_state(
    state: ContainerState, change: type[LifeEvent]
) -> None:
    machine.rule_for(a_container(state=state), event_of(change))


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("plain", [None, PlainOptions()])
def test_a_request_has_a_rule_in_every_state(
    state: ContainerState, request_: type[LifeEvent], plain: PlainOptions | None
) -> None:
    machine.rule_for(a_container(state=state, plain=plain), event_of(request_))


@pytest.mark.parametrize("state", State)
def test_a_pause_that_failed_has_a_rule_in_every_state(state: ContainerState) -> None:
    """The container may have ended meanwhile."""
    machine.rule_for(a_container(state=state), life_events.PauseFailed(reason="no", exit_code=1))


def test_an_exec_is_refused_unless_the_container_runs() -> None:
    refusals = {
        state: machine.rule_for(a_container(state=state), life_events.Exec(word="c")).refusal
        for state in State
    }
    assert {state for state, refusal in refusals.items() if refusal is None} == {State.RUNNING}


def test_a_removal_that_its_caller_gave_up_is_no_error_of_the_container() -> None:
    failed = life_events.RemovalFailed(reason="no", exit_code=1)
    removing = a_container(state=State.REMOVING, process=None)
    assert machine.step(removing, failed).container.error == "no"
    assert machine.step(removing, replace(failed, is_cancelled=True)).container.error == ""


def test_every_event_has_a_rule_and_every_rule_an_event_that_comes() -> None:
    kinds = {
        one
        for one in vars(life_events).values()
        if isinstance(one, type) and issubclass(one, LifeEvent) and one not in (LifeEvent, EffectFailed)
    }
    assert {rule.event for rule in TABLE} == kinds


def test_every_effect_is_used_and_can_be_carried_out(tmp_path: Path) -> None:
    async def body(stubs: StubEngine) -> None:
        driver: LifecycleDriver = stubs.engine.lifecycle
        assert set(driver.actions) == set(Effect)
        assert isinstance(driver.effects, Effects)

    on_virtual_time(body, tmp_path, a_container())
    assert {effect for rule in TABLE for effect in rule.effects} == set(Effect)


def test_an_effect_that_makes_something_is_undone_when_a_later_one_fails() -> None:
    undoing = {
        Effect.ATTACH_NETWORKS: Effect.DETACH_NETWORKS,
        Effect.MOUNT_VOLUMES: Effect.UNMOUNT_VOLUMES,
        Effect.CREATE_PROCESS: Effect.DELETE_PROCESS,
        Effect.MAKE_DIRECTORIES: Effect.REMOVE_DIRECTORIES,
    }
    for rule, (made, undo) in itertools.product(TABLE, undoing.items()):
        if made in rule.effects and rule.event is not life_events.Adopted:
            (failed,) = [one for one in TABLE if one.event is rule.fails and one.when is None]
            assert undo in failed.effects


def test_what_is_made_is_on_disk_before_the_next_effect() -> None:
    reported = {life_events.Attached, life_events.ProcessCreated}
    assert all(rule.saving is Saving.FIRST for rule in TABLE if rule.event in reported)


def test_what_reaches_the_networks_waits_until_those_of_earlier_processes_are_restored() -> None:
    """Those of an adoption follow the restoring."""
    for rule in TABLE:
        reaching = {Effect.ATTACH_NETWORKS, Effect.CHANGE_NETWORKS, Effect.RENAME_ON_NETWORKS} & set(
            rule.effects
        )
        if reaching and rule.event is not life_events.Adopted:
            (first,) = reaching
            assert Effect.AWAIT_NETWORKS in rule.effects[: rule.effects.index(first)]


def test_nothing_that_is_being_removed_starts() -> None:
    starting = {Effect.CREATE_PROCESS, Effect.START_COMMAND, Effect.ATTACH_NETWORKS}
    starting |= {Effect.APPLY_LIMITS, Effect.CHANGE_NETWORKS, Effect.RENAME_ON_NETWORKS}
    for rule in TABLE:
        if State.REMOVING in rule.states:
            assert not starting & set(rule.effects)
            assert rule.to in (None, State.REMOVING)


def test_what_frees_a_resource_never_stops_at_a_failure() -> None:
    for rule in TABLE:
        if issubclass(rule.event, EffectFailed) and rule.event is not life_events.CreateFailed:
            quiet = {Effect.REFUSE_CLIENTS, Effect.FORGET_SECRETS, Effect.SEE_FROZEN, Effect.RELEASE_NAME}
            assert set(rule.effects) <= BEST_EFFORT | quiet


def test_what_is_interrupted_leaves_nothing_that_is_not_found_again() -> None:
    made = {Effect.ATTACH_NETWORKS, Effect.CREATE_PROCESS, Effect.START_COMMAND, Effect.FREEZE}
    assert not INTERRUPTIBLE & made


def test_a_stop_by_its_user_ends_a_restart_that_waits() -> None:
    always = PlainOptions(restart=RestartPolicy(name="always"))
    ended = a_container(state=State.EXITED, process=None, plain=always)
    due = life_events.Start(by_policy=True)
    assert machine.rule_for(ended, due).effects
    stopped = machine.step(ended, life_events.UserStops()).container
    assert not machine.rule_for(stopped, due).effects
    assert machine.rule_for(stopped, replace(due, ignore_stop=True)).effects


def test_a_container_that_has_ended_is_unhealthy_in_the_same_record() -> None:
    """A later change could be about the next run."""
    running = a_container(health=Health(status=HealthStatus.HEALTHY))
    ended = machine.step(running, event_of(life_events.Exited)).container
    assert ended.health == Health(status=HealthStatus.UNHEALTHY)
    assert machine.step(a_container(), event_of(life_events.Exited)).container.health is None


def test_an_event_that_a_state_does_not_have_is_an_error_of_the_program() -> None:
    with pytest.raises(AssertionError, match="Exited in state created"):
        machine.step(a_container(state=State.CREATED), event_of(life_events.Exited))
