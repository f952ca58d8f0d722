"""What instructions change in an image's configuration."""

import pytest

from skep.engine.build.dockerfile.config import (
    BuildArguments,
    StageState,
    adapted,
    apply_changes,
    begun,
    changed,
    command_of_step,
    expanded,
    variables_of,
)
from skep.engine.build.dockerfile.dockerfile import parse
from skep.engine.build.dockerfile.instructions import instruction_of
from skep.engine.containers.create import invocation
from skep.engine.containers.request import CreateRequest
from skep.engine.images.image import ContainerDefaults
from skep.errors import InvalidArgument
from skep.model.container import HealthConfig
from skep.model.values.times import SECOND_NS


def after(*lines: str, base: ContainerDefaults | None = None) -> tuple[StageState, str]:
    """The state after ``lines``, and the last one's line in the history."""
    state, comment = begun(base or ContainerDefaults()), ""
    for line in parse("\n".join(lines)).lines:
        ready = expanded(instruction_of(line), variables_of(state, {}), "\\")
        state, comment = changed(state, ready)
    return state, comment


@pytest.mark.parametrize(
    ("line", "comment"),
    [
        ('ENV A="x y" B=$A', "ENV A=x y B="),
        ("LABEL a=b c='d e'", "LABEL a=b c=d e"),
        ("ARG A B=c", "ARG A B=c"),
        ("MAINTAINER me <me@x>", "MAINTAINER me <me@x>"),
        ("WORKDIR a/../b", "WORKDIR /b"),
        ("USER alice", "USER alice"),
        ("STOPSIGNAL SIGINT", "STOPSIGNAL SIGINT"),
        ("EXPOSE 80 53/udp", "EXPOSE 53/udp 80"),
        ("VOLUME /a /b", "VOLUME [/a /b]"),
        ("ONBUILD RUN x", "ONBUILD RUN x"),
        ('SHELL ["bash", "-c"]', "SHELL [bash -c]"),
        ('CMD ["a", "b\\"c"]', 'CMD ["a" "b\\"c"]'),
        ("CMD a b", 'CMD ["/bin/sh" "-c" "a b"]'),
        ("CMD", 'CMD ["/bin/sh" "-c" ""]'),
        ("ENTRYPOINT a", 'ENTRYPOINT ["/bin/sh" "-c" "a"]'),
        (
            "HEALTHCHECK --interval=90s --retries=3 CMD x",
            'HEALTHCHECK &{["CMD-SHELL" "x"] "1m30s" "0s" "0s" \'\\x03\'}',
        ),
        ("HEALTHCHECK NONE", 'HEALTHCHECK &{["NONE"] "0s" "0s" "0s" \'\\x00\'}'),
    ],
)
def test_the_history_has_the_builders_words(line: str, comment: str) -> None:
    assert after(line)[1] == comment


def test_the_classic_builder_takes_options_of_the_health_check_before() -> None:
    """As Docker Engine 20.10.  BuildKit starts with defaults."""
    lines = parse("HEALTHCHECK --interval=5s --retries=2 CMD x\nHEALTHCHECK --timeout=1m CMD y").lines
    first, second = (instruction_of(line) for line in lines)
    before, _ = changed(begun(ContainerDefaults()), first)
    after, _ = changed(before, second)
    inherited = HealthConfig(
        test=("CMD-SHELL", "y"), interval=5 * SECOND_NS, timeout=60 * SECOND_NS, retries=2
    )
    assert adapted(after, before, second, is_buildkit=False).config.healthcheck == inherited
    own = HealthConfig(test=("CMD-SHELL", "y"), timeout=60 * SECOND_NS)
    assert adapted(after, before, second, is_buildkit=True).config.healthcheck == own


def test_variables_are_replaced_in_their_place() -> None:
    state, _ = after("ENV A=1 B=2", "ENV A=3$B C=$A")
    assert state.config.env == (
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "A=32",
        "B=2",
        "C=1",
    )


def test_an_entry_point_drops_the_command_of_the_image_below_but_not_the_stages_own() -> None:
    base = ContainerDefaults(cmd=("sh",))
    assert after("ENTRYPOINT x", base=base)[0].config.cmd is None
    assert after("CMD y", "ENTRYPOINT x", base=base)[0].config.cmd == ("/bin/sh", "-c", "y")


def test_working_directories_are_below_each_other() -> None:
    assert after("WORKDIR /a", "WORKDIR b/./c", "WORKDIR ../d/")[0].config.working_dir == "/a/b/d"
    assert after("WORKDIR //x//y")[0].config.working_dir == "/x/y"


def test_ports_have_protocols_and_ranges() -> None:
    state, _ = after("ENV P='80 90-91/UDP'", "EXPOSE $P 0.0.0.0:1:22")
    assert sorted(state.config.exposed_ports or ()) == ["22/tcp", "80/tcp", "90/udp", "91/udp"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("EXPOSE x", "Invalid containerPort: x"),
        ("EXPOSE 80/foo", "Invalid proto: foo"),
        ("EXPOSE 90-80", "Invalid containerPort: 90-80"),
        ("EXPOSE 70000", "Invalid containerPort: 70000"),
        ("STOPSIGNAL FOO", "Invalid signal: FOO"),
        ("WORKDIR $NOSUCH", "cannot normalize nothing"),
        ("VOLUME $NOSUCH", "VOLUME specified can not be an empty string"),
    ],
)
def test_what_no_configuration_can_have_is_refused(line: str, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        after(line)


def test_variables_that_grow_without_end_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="more than"):
        after("ENV A=" + "x" * 1000, *["ENV A=$A$A$A$A"] * 10)


def test_arguments_have_the_users_value_then_the_defaults() -> None:
    arguments = BuildArguments({"A": "given", "B": None, "UNUSED": "x"}, {})
    arguments.declare("A", "before", before_stages=True)
    arguments.declare("C", "c", before_stages=True)
    assert dict(arguments.of_stages) == {"A": "given", "C": "c"}
    arguments.begin_stage()
    assert dict(arguments.visible(())) == {}
    for name, value in (("A", "default"), ("B", "default"), ("C", None), ("D", None)):
        arguments.declare(name, value)
    assert dict(arguments.visible(())) == {"A": "given", "B": "default", "C": "c"}
    assert dict(arguments.visible(["A=image"])) == {"B": "default", "C": "c"}
    assert arguments.unused == ("UNUSED",)


def test_a_step_is_named_by_the_arguments_that_it_sees_but_not_by_undeclared_proxies() -> None:
    arguments = BuildArguments({"http_proxy": "http://p", "B": "2"}, {})
    arguments.declare("B", None)
    assert command_of_step(("sh", "-c", "x"), arguments, arguments.visible(())) == (
        "|1",
        "B=2",
        "sh",
        "-c",
        "x",
    )
    assert arguments.unused == ()
    arguments.declare("http_proxy", None)
    shown = command_of_step(("x",), arguments, arguments.visible(()))
    assert shown == ("|2", "B=2", "http_proxy=http://p", "x")


def test_buildkits_proxies_reach_commands_alone_in_both_spellings() -> None:
    arguments = BuildArguments({"http_proxy": "http://p", "NO_PROXY": "x"}, {}, is_buildkit=True)
    assert dict(arguments.visible(())) == {}
    assert dict(arguments.proxies) == {
        "http_proxy": "http://p",
        "HTTP_PROXY": "http://p",
        "no_proxy": "x",
        "NO_PROXY": "x",
    }
    assert dict(BuildArguments({"http_proxy": "http://p"}, {}).proxies) == {}


def test_the_later_one_of_arg_and_env_wins_in_buildkit_and_env_in_the_classic_builder() -> None:
    for is_buildkit in (True, False):
        arguments = BuildArguments({}, {}, is_buildkit=is_buildkit)
        arguments.declare("A", "arg")
        arguments.hide(["A"])
        assert dict(arguments.visible(["A=env"])) == {}
        arguments.declare("A", "again")
        assert dict(arguments.visible(["A=env"])) == ({"A": "again"} if is_buildkit else {})


def test_a_stage_has_the_arguments_of_the_stage_that_it_is_based_on_but_the_variables_of_its_image_win() -> (
    None
):
    arguments = BuildArguments({}, {}, is_buildkit=True)
    arguments.declare("A", "1")
    arguments.declare("E", "arg")
    base = arguments.stage
    arguments.begin_stage(base, ["E=env"])
    assert dict(arguments.visible(["E=env"])) == {"A": "1"}
    arguments.declare("OWN", "x")
    assert "OWN" not in base.declared
    arguments.begin_stage()
    assert dict(arguments.visible(())) == {}


def test_arguments_of_one_instruction_see_those_before_them_and_given_ones_their_default_never() -> None:
    arg = instruction_of(parse("ARG A=1 B=$A-$X C=${NO:?unset}").lines[0])
    with pytest.raises(InvalidArgument, match="unset"):
        expanded(arg, {"X": "x"}, "\\")
    ready = expanded(arg, {"X": "x"}, "\\", None, {"C": "given"})
    assert ready.pairs == (("A", "1"), ("B", "1-x"), ("C", "${NO:?unset}"))  # type: ignore[attr-defined]
    assert expanded(arg, {"X": "x"}, "\\", None, {"A": "2", "C": ""}).pairs[1] == ("B", "2-x")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "executed"),
    [
        ("", "", ""),
        ("", 'CMD ["cmd", "p"]', "cmd p"),
        ("", "CMD cmd p", "/bin/sh -c cmd p"),
        ("ENTRYPOINT entry e", "", "/bin/sh -c entry e"),
        ('ENTRYPOINT ["entry", "e"]', "", "entry e"),
        ('ENTRYPOINT ["entry", "e"]', 'CMD ["cmd", "p"]', "entry e cmd p"),
        ('ENTRYPOINT ["entry", "e"]', "CMD cmd p", "entry e /bin/sh -c cmd p"),
        # The shell gets the words of CMD as parameters, so its command ignores them.
        ("ENTRYPOINT entry e", 'CMD ["cmd", "p"]', "/bin/sh -c entry e cmd p"),
        ("ENTRYPOINT entry e", "CMD cmd p", "/bin/sh -c entry e /bin/sh -c cmd p"),
    ],
)
def test_entrypoint_and_cmd_are_one_command(entrypoint: str, cmd: str, executed: str) -> None:
    state, _ = after(*filter(None, ("USER root", entrypoint, cmd)))
    if not executed:
        with pytest.raises(InvalidArgument, match="No command specified"):
            invocation(CreateRequest(), state.config)
        return
    first, rest = invocation(CreateRequest(), state.config)
    assert " ".join((*first, *rest)) == executed


def test_changes_of_a_commit_are_instructions() -> None:
    config = apply_changes(ContainerDefaults(user="a"), ["ENV A=1", "CMD x $A", "LABEL l=$A"])
    assert (config.user, config.env, config.cmd) == ("a", ("A=1",), ("/bin/sh", "-c", "x $A"))
    assert config.labels == {"l": "1"}
    with pytest.raises(InvalidArgument, match="run is not a valid change command"):
        apply_changes(ContainerDefaults(), ["RUN x"])
