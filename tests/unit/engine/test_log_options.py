"""Options of log drivers: what is refused, in Docker's words, and what they become."""

import pytest

from skep.engine.containers.container import Container, ContainerConfig, LogConfig
from skep.engine.log_drivers.drivers import sending_drivers
from skep.engine.log_drivers.facts import all_attributes, attributes_of, facts_of, tag_of
from skep.engine.log_drivers.options import buffer_bytes, log_config, with_defaults
from skep.errors import InvalidArgument
from skep.model.values.ids import ContainerId
from skep.model.values.meta import Driver

ID = ContainerId("0123456789abcdef" * 4)
ENV = ("COLOUR=red", "SHAPE=round=ish", "bare")
LABELS = {"io.skep.a": "1", "io.skep.b": "2", "other": "3"}


def logged(name: str, **options: str) -> LogConfig:
    written = {key.replace("_", "-"): value for key, value in options.items()}
    return log_config(Driver(name=name, options=written), sending_drivers())


def a_container(log: LogConfig) -> Container:
    config = ContainerConfig(path="sh", args=("-c", "echo hi"), env=ENV, log=log)
    return Container(
        id=ID, name="web", image="busybox:1", image_id=f"sha256:{'ab' * 32}", config=config, labels=LABELS
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nosuch", {}, "logger: no log driver named 'nosuch' is registered"),
        ("awslogs", {}, "logger: no log driver named 'awslogs' is registered"),
        ("gcplogs", {}, "logger: no log driver named 'gcplogs' is registered"),
        ("json-file", {"colour": "red"}, "unknown log opt 'colour' for json-file log driver"),
        ("local", {"colour": "red"}, "unknown log opt 'colour' for log driver local"),
        ("json-file", {"mode": "loud"}, "logger: logging mode not supported: loud"),
        (
            "json-file",
            {"max_buffer_size": "1m"},
            "logger: max-buffer-size option is only supported with 'mode=non-blocking'",
        ),
        (
            "json-file",
            {"mode": "non-blocking", "max_buffer_size": "much"},
            "error parsing option max-buffer-size: invalid size: 'much'",
        ),
        ("local", {"cache_disabled": "perhaps"}, "invalid value for option cache-disabled: perhaps"),
        ("json-file", {"max_file": "many"}, 'strconv.Atoi: parsing "many": invalid syntax'),
        ("json-file", {"max_file": "0"}, "max-file cannot be less than 1"),
        ("json-file", {"max_size": "0"}, "max-size must be a positive number"),
        ("json-file", {"compress": "true"}, "compress cannot be true when max-file is less than 2"),
        ("local", {"max_file": "1"}, "compression cannot be enabled when max file count is 1"),
        ("local", {"max_file": "-1"}, "max-file must not be negative"),
    ],
)
def test_a_wrong_option_is_refused_in_dockers_words(name: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        logged(name, **options)


def test_the_driver_local_is_bounded_and_compressed_without_options() -> None:
    config = logged("local")
    assert (config.max_size_bytes, config.max_files, config.compress) == (20 << 20, 5, True)
    plain = logged("json-file")
    assert (plain.max_size_bytes, plain.max_files, plain.compress) == (0, 1, False)
    assert logged("json-file", max_size="1m", max_file="3", compress="true").compress


@pytest.mark.parametrize(("options", "is_readable"), [({}, True), ({"cache_disabled": "true"}, False)])
def test_what_a_driver_sends_is_read_here_unless_its_user_wants_no_cache(
    options: dict[str, str], *, is_readable: bool
) -> None:
    config = logged("gelf", gelf_address="udp://127.0.0.1:12201", **options)
    assert (config.type, config.is_readable) == ("gelf", is_readable)
    assert (config.max_size_bytes, config.max_files) == (20 << 20, 5), "as much as the driver local keeps"


def test_nothing_is_kept_of_a_container_with_the_driver_none() -> None:
    config = logged("none", whatever="1")
    assert (config.type, config.is_readable) == ("none", False)


def test_the_nodes_options_are_added_to_its_own_driver_alone() -> None:
    default = Driver(name="json-file", options={"max-size": "10m", "cache-max-size": "5m"})
    assert with_defaults(Driver(name=""), default) == default
    own = Driver(name="", options={"max-size": "1m"})
    assert with_defaults(own, default).options == {"max-size": "1m", "cache-max-size": "5m"}
    assert with_defaults(Driver(name="local"), default).options == {"cache-max-size": "5m"}
    assert with_defaults(Driver(name="none"), default).options == {}


def test_a_buffer_is_bounded_only_where_its_user_wants_no_blocking() -> None:
    assert buffer_bytes({"mode": "blocking"}) == 0
    assert buffer_bytes({"mode": "non-blocking"}) == 1 << 20
    assert buffer_bytes({"mode": "non-blocking", "max-buffer-size": "4m"}) == 4 << 20


def test_a_buffer_has_a_bound_in_the_process_that_sends() -> None:
    large = {"mode": "non-blocking", "max_buffer_size": "65m"}
    with pytest.raises(InvalidArgument, match="max-buffer-size 65m is larger than 64m"):
        logged("gelf", gelf_address="udp://127.0.0.1:12201", **large)
    assert logged("json-file", **large).type == "json-file", "it has no such buffer"
    written_before = {"mode": "non-blocking", "max-buffer-size": "65m"}
    assert buffer_bytes(written_before) == 64 << 20


async def test_labels_and_variables_are_named_or_matched() -> None:
    named = await all_attributes({"labels": "other,absent", "env": "SHAPE,bare"}, LABELS, ENV)
    assert named == {"other": "3", "SHAPE": "round=ish"}
    matched = await all_attributes({"labels-regex": r"^io\.", "env-regex": "OLO"}, LABELS, ENV)
    assert matched == {"io.skep.a": "1", "io.skep.b": "2", "COLOUR": "red"}
    with pytest.raises(InvalidArgument, match="error parsing regexp"):
        await all_attributes({"labels-regex": "("}, LABELS, ENV)


def test_records_of_earlier_versions_still_have_their_labels() -> None:
    assert attributes_of(a_container(LogConfig(options={"labels": "other"}))) == {"other": "3"}


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("", ID[:12]),
        ("{{.Name}}/{{.FullID}}", f"web/{ID}"),
        ("{{.ImageName}} {{.ImageID}} {{.DaemonName}}", f"busybox:1 {'ab' * 6} docker"),
        ("{{.ImageFullID}}", f"sha256:{'ab' * 32}"),
        ("{{.Command}}", "sh -c echo hi"),
        ("{{upper .Name}} {{truncate .ID 4}} {{pad .Name 1 2}}|{{json .Name}}", 'WEB 0123  web  |"web"'),
        ("{{.Hostname}}", "node"),
    ],
)
def test_a_tag_is_a_template(tag: str, expected: str) -> None:
    assert tag_of({"tag": tag}, facts_of(a_container(LogConfig()), "node")) == expected


@pytest.mark.parametrize("tag", ["{{.Nonsense}}", "{{", "{{pad .Name 99999999999 1}}", "{{truncate .ID -1}}"])
def test_a_tag_that_is_no_template_is_refused(tag: str) -> None:
    with pytest.raises(InvalidArgument, match="failed to initialize logging driver"):
        tag_of({"tag": tag}, facts_of(a_container(LogConfig()), "node"))
