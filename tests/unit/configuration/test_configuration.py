"""Flags, TOML and daemon.json: precedence, errors of bad values, and what a running node reloads."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from skep.configuration.configuration import AddressPool, Configuration, ConfigurationError, TcpHost, UnixHost
from skep.configuration.settings import SETTINGS, reload
from skep.configuration.sources import Arguments, LoadedConfiguration, combine, load, parse_arguments
from skep.model.service import DiscreteResource, GenericResource, NamedResource
from skep.paths import DEFAULT_DATA, DEFAULT_RUN


def combined(
    *argv: str, toml: dict[str, Any] | None = None, docker: dict[str, Any] | None = None
) -> LoadedConfiguration:
    return combine(parse_arguments(argv), toml or {}, docker or {})


def configured(*argv: str, **files: Any) -> Configuration:
    return combined(*argv, **files).configuration


def refused(*argv: str, **files: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        combined(*argv, **files)
    return str(caught.value)


# --- precedence -----------------------------------------------------------------------------------------------------


def test_nothing_written_gives_the_defaults() -> None:
    configuration = configured()
    assert configuration == Configuration()
    assert configuration.api_hosts == (UnixHost(Path("/run/skep/skep.sock")),)


def test_a_flag_wins_over_toml_and_toml_over_daemon_json() -> None:
    toml, docker = {"data-dir": "/toml"}, {"data-root": "/docker"}
    assert configured("--data-dir", "/flag", toml=toml, docker=docker).data_dir == Path("/flag")
    assert configured(toml=toml, docker=docker).data_dir == Path("/toml")
    assert configured(docker=docker).data_dir == Path("/docker")
    assert configured().data_dir == DEFAULT_DATA


def test_flags_and_keys_of_earlier_versions_still_work_and_the_present_ones_win() -> None:
    assert configured(toml={"disk-full": 91, "image-disk-high": 70}).disk_pressure == 91
    assert configured("--image-disk-low", "60").image_gc_low == 60
    assert configured(toml={"disk-full": 91, "disk-pressure": 92}).disk_pressure == 92


def test_a_flag_can_take_back_what_a_file_says() -> None:
    assert configured("--debug=false", toml={"debug": True}).debug is False
    assert configured("--debug").debug is True


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (2380, ":2380"),
        ("2380", ":2380"),
        (":2380", ":2380"),
        ("192.0.2.1:2380", "192.0.2.1:2380"),
        ("[fd00::1]:2380", "[fd00::1]:2380"),
    ],
)
def test_a_peer_address_is_a_port_or_an_address_with_one(written: int | str, read: str) -> None:
    assert configured(toml={"peer-addr": written}).peer_addr == read


def test_daemon_json_is_understood_by_its_own_names() -> None:
    configuration = configured(
        docker={
            "debug": True,
            "hosts": ["unix:///run/other.sock"],
            "labels": ["zone=a b"],
            "node-generic-resources": ["GPU=UUID1", "GPU=UUID2", "FPGA=3"],
            "insecure-registries": ["registry:5000", "10.0.0.0/8"],
            "registry-mirrors": ["https://mirror.example.com"],
            "log-driver": "json-file",
            "log-opts": {"max-size": "10m"},
            "default-address-pools": [{"base": "10.10.0.0/16", "size": 24}],
            "data-root": "/srv/skep",
            "cdi-spec-dirs": ["/srv/cdi"],
        }
    )
    assert configuration == Configuration(
        debug=True,
        hosts=(UnixHost(Path("/run/other.sock")),),
        labels={"zone": "a b"},
        cdi_spec_dirs=(Path("/srv/cdi"),),
        generic_resources=(
            GenericResource(discrete_resource_spec=DiscreteResource(kind="FPGA", value=3)),
            GenericResource(named_resource_spec=NamedResource(kind="GPU", value="UUID1")),
            GenericResource(named_resource_spec=NamedResource(kind="GPU", value="UUID2")),
        ),
        insecure_registries=("registry:5000", "10.0.0.0/8"),
        registry_mirrors=("https://mirror.example.com/",),
        log_opts={"max-size": "10m"},
        default_address_pools=(AddressPool("10.10.0.0/16", 24),),
        data_dir=Path("/srv/skep"),
    )


def test_what_daemon_json_has_and_skep_does_not_use_is_named() -> None:
    (warning,) = combined(docker={"storage-driver": "btrfs", "debug": True, "bip": "10.0.0.1/24"}).warnings
    assert warning == "/etc/docker/daemon.json: skep does not use bip, storage-driver"


def test_a_wrong_host_that_the_file_has_is_that_of_the_file_although_a_flag_repeats_it() -> None:
    toml = {"hosts": ["tcp://0.0.0.0:2376x"]}
    for flags, named in ((["tcp://0.0.0.0:2376x"], "skep.toml: hosts is"), (["tcp://web:80"], "--host is")):
        words = [word for flag in ["unix:///run/a.sock", *flags] for word in ("--host", flag)]
        with pytest.raises(ConfigurationError, match=named):
            combined(*words, toml=toml)


def test_hosts_of_the_file_that_flags_replace_are_named() -> None:
    toml = {"hosts": ["unix:///run/a.sock", "unix:///run/b.sock"]}
    (warning,) = combined("--host", "unix:///run/a.sock", toml=toml).warnings
    assert warning.endswith(": hosts is not used, because --host is given: unix:///run/b.sock")
    assert combined(toml=toml).warnings == ()
    assert combined("--host", "unix:///run/a.sock", "-H", "unix:///run/b.sock", toml=toml).warnings == ()


def test_beside_an_engine_its_sockets_and_data_stay_its_own() -> None:
    docker = {"hosts": ["unix:///var/run/docker.sock"], "data-root": "/var/lib/docker", "debug": True}
    configuration = configured("--engine-socket", "/var/run/docker.sock", docker=docker)
    assert configuration.hosts == ()
    assert configuration.data_dir == DEFAULT_DATA
    assert configuration.debug


def test_log_options_of_another_driver_than_the_chosen_one_are_not_used() -> None:
    docker = {"log-driver": "syslog", "log-opts": {"syslog-address": "udp://192.0.2.1:514"}}
    loaded = combined("--log-driver", "json-file", docker=docker)
    assert (loaded.configuration.log_driver, loaded.configuration.log_opts) == ("json-file", {})
    assert loaded.warnings == ("log-opts is not used, because it is for log-driver syslog",)
    assert configured(toml={"log-driver": "local"}, docker=docker).log_opts == {}
    assert configured(toml={"log-driver": "syslog"}, docker=docker).log_opts == docker["log-opts"]
    own = {"log-opts": {"max-size": "1m"}}
    assert configured("--log-driver", "local", toml=own, docker=docker).log_opts == {}
    assert configured("--log-driver", "local", toml=own).log_opts == own["log-opts"]


def test_a_log_driver_of_docker_that_is_not_supported_is_a_warning() -> None:
    loaded = combined(docker={"log-driver": "awslogs", "log-opts": {"awslogs-group": "a"}})
    assert "log driver awslogs is not supported" in loaded.warnings[0]
    assert (loaded.configuration.log_driver, loaded.configuration.log_opts) == ("json-file", {})


def test_labels_may_hold_blanks_and_equals_signs() -> None:
    configuration = configured("--label", "note=two words", "--label", "formula=a=b")
    assert configuration.labels == {"note": "two words", "formula": "a=b"}


def test_several_hosts_are_served_once_each() -> None:
    hosts = ("-H", "unix:///run/a.sock", "--host", "unix:///run/b.sock", "-H", "unix:///run/a.sock")
    assert configured(*hosts).hosts == (UnixHost(Path("/run/a.sock")), UnixHost(Path("/run/b.sock")))


def test_tcp_is_served_with_a_certificate_and_an_authority(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("cert", "key", "ca")]
    for file in files:
        file.touch()
    flags = [
        word
        for name, file in zip(("cert", "key", "ca"), files, strict=True)
        for word in (f"--tls-{name}", str(file))
    ]
    assert configured("-H", "tcp://[::1]:2376", *flags).hosts == (TcpHost("::1", 2376),)


def test_every_setting_has_a_field_of_the_configuration() -> None:
    fields = set(Configuration.__struct_fields__)
    assert {setting.attribute for setting in SETTINGS} == fields


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_that_are_there_by_default_may_be_missing(tmp_path: Path) -> None:
    arguments = Arguments(toml=tmp_path / "skep.toml", daemon_json=tmp_path / "daemon.json")
    assert load(arguments) == LoadedConfiguration(Configuration())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("toml", None, "does not exist"),
        ("toml", "debug = yes", "is not TOML: .*, at 'debug'"),
        ("toml", 'hosts = ["a"]\n\nhosts = [\n  "b",\n]\n', "Cannot overwrite a value .*, at 'hosts'"),
        ("toml", "[a]\nb = 1\n[a]\nc = 2\n", r"twice .*, at '\[a\]'"),
        ("toml", 'token = "secret\n', "at 'token'$"),
        ("toml", b"\xff\xfe", "cannot be read"),
        ("json", None, "does not exist"),
        ("json", "{", "is not a JSON object"),
        ("json", "[]", "is not a JSON object"),
    ],
)
def test_a_named_file_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, content: str | bytes | None, sentence: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = (
        Arguments(toml=path, toml_required=True, daemon_json=None)
        if name == "toml"
        else Arguments(toml=tmp_path / "none", daemon_json=path, daemon_json_required=True)
    )
    with pytest.raises(ConfigurationError, match=sentence) as caught:
        load(arguments)
    assert str(path) in str(caught.value)


def test_an_empty_daemon_json_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "daemon.json").write_text("\n")
    assert load(
        Arguments(toml=tmp_path / "none", daemon_json=tmp_path / "daemon.json")
    ) == LoadedConfiguration(Configuration())


# --- bad values -----------------------------------------------------------------------------------------------------

BAD = [
    ("data-dir", "relative", "write an absolute path"),
    ("data-dir", "/a/../b", "write an absolute path"),
    ("data-dir", "", "is empty"),
    ("run-dir", "run", "write an absolute path"),
    ("host", "/run/skep.sock", "write unix:///path/of.sock or tcp://address:port"),
    ("host", "fd://", "write unix:///path/of.sock or tcp://address:port"),
    ("host", "unix://relative", "write an absolute path"),
    ("host", "unix:///" + "x" * 120, "at most 107 bytes"),
    ("host", "tcp://0.0.0.0", "an IP address and a port"),
    ("host", "tcp://somewhere:2376", "an IP address and a port"),
    ("host", "tcp://127.0.0.1:99999", "an IP address and a port"),
    ("host", "tcp://127.0.0.1:2376/path", "nothing may follow the port"),
    ("tls-cert", "/nonexistent/file", "there is no such file"),
    ("engine-socket", "tcp://1.2.3.4:2375", "write an absolute path"),
    ("listen-addr", "1.2.3.4:0", "an IP address or interface, and a port if you like"),
    ("listen-addr", "300.1.1.1", "an IP address or the name of an interface"),
    ("advertise-addr", "a name", "an IP address or the name of an interface"),
    ("data-path-addr", "1.2.3.4:5", "an IP address or the name of an interface"),
    ("peer-addr", "0", "choose a port from 1 to 65535"),
    ("peer-addr", "eth0:2378", "write a port, or an IP address with a port"),
    ("peer-addr", "192.0.2.1", "write a port, or an IP address with a port"),
    ("peer-addr", "192.0.2.1:70000", "write a port, or an IP address with a port"),
    ("data-path-port", "80", "choose a port from 1024 to 49151"),
    ("data-path-port", "-1", "choose a port from 1024 to 49151"),
    ("data-path-port", "many", "write a number"),
    ("debug", "maybe", "write true or false"),
    ("log-format", "xml", "choose text or json"),
    ("label", "no-value", "write key=value"),
    ("label", "=v", "write key=value"),
    ("generic-resource", "gpu", "write kind=number or kind=name"),
    ("generic-resource", "gpu=-1", "must not be negative"),
    ("generic-resource", "gpu=9223372036854775808", "must not be negative, nor above"),
    ("allow", "everything", "write all, none, or some of privileged, devices"),
    ("cdi-spec-dir", "etc/cdi", "absolute"),
    ("executor", "docker", "choose oci or process"),
    ("cgroup-parent", "a/../b", "names separated by '/'"),
    ("runc", "", "is empty"),
    ("etcd-binary", "/nonexistent/etcd", "there is no such file"),
    ("acme-dns-hook", "/nonexistent/hook", "there is no such file"),
    ("store-quota", "4 GB", "write a number with its unit"),
    ("store-quota", "1MiB", "from 16MiB to 64GiB"),
    ("insecure-registry", "http://x", "without http://"),
    ("registry-mirror", "mirror.example.com", "write a URL"),
    ("credential-helper", "https://r.example.com=ecr", "without http://"),
    ("credential-helper", "r.example.com=../bin/sh", "docker-credential-NAME"),
    ("credential-helper", "r.example.com", "docker-credential-NAME"),
    ("log-driver", "printer", "write one of json-file"),
    ("log-opt", "max-size", "write key=value"),
    ("default-address-pool", "10.0.0.0/8", "write base="),
    ("default-address-pool", "base=10.0.0.0/16,size=8", "a prefix length from 16 to 30"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), BAD)
def test_the_error_of_a_bad_value_says_what_to_do(name: str, value: str, sentence: str) -> None:
    problem = refused(f"--{name}={value}")
    assert problem.startswith(f"--{name} ")
    assert sentence in problem


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("data-dir", 5, "write a text in quotes"),
        ("debug", "perhaps", "write true or false"),
        ("data-path-port", True, "write a number"),
        ("hosts", "unix:///run/a.sock", "write a list of texts"),
        ("labels", {"a": "b"}, "write a list of texts"),
        ("log-opts", {"max-file": 3}, "write the value as a text"),
        ("default-address-pools", {"base": "x"}, "write a list"),
        ("colour", "blue", "there is no setting 'colour'"),
    ],
)
def test_a_bad_value_in_the_file_names_the_file(key: str, value: Any, sentence: str) -> None:
    problem = refused(toml={key: value})
    assert problem.startswith("/etc/skep/skep.toml: ")
    assert sentence in problem


def test_a_label_with_two_values_is_refused() -> None:
    assert "gives 'a' two values, '1' and '2': keep one" in refused("--label", "a=1", "--label", "a=2")


@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        (("gpu=1", "gpu=2"), "twice with a number"),
        (("gpu=A", "gpu=A"), "twice: keep one"),
        (("gpu=1", "gpu=A"), "both a number and names"),
    ],
)
def test_a_generic_resource_is_a_number_or_names(resources: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(*(f"--generic-resource={resource}" for resource in resources))


def test_tcp_without_client_verification_is_refused() -> None:
    assert "set --tls-cert, --tls-key and --tls-ca" in refused("-H", "tcp://127.0.0.1:2376")


def test_half_of_tls_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cert").touch()
    assert "belong together" in refused("--tls-cert", str(tmp_path / "cert"))


def test_a_run_dir_whose_sockets_would_be_too_long_is_refused() -> None:
    assert "run-dir is too long" in refused("--run-dir", "/" + "x" * 100)


def test_one_directory_for_state_and_sockets_is_refused() -> None:
    assert "choose a run-dir on tmpfs" in refused("--data-dir", "/x", "--run-dir", "/x")


def test_all_problems_are_reported_at_once() -> None:
    assert len(refused("--data-path-port=1", "--executor=x", toml={"nonsense": 1}).splitlines()) == 3


# --- reload ---------------------------------------------------------------------------------------------------------


def test_a_reload_takes_over_what_needs_no_restart_and_names_the_rest() -> None:
    running = Configuration()
    written = replace(running, debug=True, labels={"a": "b"}, data_dir=Path("/other"), log_format="json")
    taken = reload(running, written)
    assert taken.configuration == replace(running, debug=True, labels={"a": "b"})
    assert taken.reloaded == ("debug", "labels")
    assert taken.needs_restart == ("data-dir", "log-format")


def test_reloading_the_same_changes_nothing() -> None:
    taken = reload(Configuration(), Configuration())
    assert (taken.reloaded, taken.needs_restart) == ((), ())


def test_directories_below_symbolic_links_are_taken_by_their_real_names(tmp_path: Path) -> None:
    """runc refuses a root file system whose path has a symbolic link in it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "var").symlink_to("real")
    flags = ("--data-dir", f"{tmp_path}/var/lib", "--run-dir", f"{tmp_path}/var/run", "--daemon-json", "")
    configuration = load(parse_arguments((*flags, "--config", str(toml_file(tmp_path))))).configuration
    assert configuration.data_dir == tmp_path / "real/lib"
    assert configuration.run_dir == tmp_path / "real/run"


def test_two_names_of_one_directory_are_one_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "var").symlink_to("real")
    flags = ("--data-dir", f"{tmp_path}/var/skep", "--run-dir", f"{tmp_path}/real/skep", "--daemon-json", "")
    with pytest.raises(ConfigurationError, match="data-dir and run-dir are both"):
        load(parse_arguments((*flags, "--config", str(toml_file(tmp_path)))))


def test_the_error_of_a_misspelled_key_suggests_the_nearest_one() -> None:
    assert "there is no setting 'manager': did you mean 'managers'?" in refused(
        toml={"manager": "192.0.2.1:2377"}
    )
    assert "did you mean 'data-dir'?" in refused(toml={"data_dir": "/x"})


def toml_file(directory: Path) -> Path:
    """An empty configuration file."""
    path = directory / "skep.toml"
    path.touch()
    return path


# --- rootless ---------------------------------------------------------------------------------------------------------


def test_a_rootless_node_keeps_its_state_where_rootless_docker_has_its_own() -> None:
    home = {"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/run/user/1000"}
    arguments = parse_arguments(["--rootless"], home)
    assert (arguments.toml, arguments.daemon_json) == (
        Path("/home/ada/.config/skep/skep.toml"),
        Path("/home/ada/.config/docker/daemon.json"),
    )
    configuration = combine(arguments, {}, {}).configuration
    assert configuration.data_dir == Path("/home/ada/.local/share/skep")
    assert configuration.api_hosts == (UnixHost(Path("/run/user/1000/skep.sock")),)
    assert configuration.run_dir == DEFAULT_RUN, "in its own namespace"
    elsewhere = {**home, "XDG_CONFIG_HOME": "/c", "XDG_DATA_HOME": "/d"}
    arguments = parse_arguments(["--rootless"], elsewhere)
    assert (arguments.toml, arguments.defaults["data_dir"]) == (Path("/c/skep/skep.toml"), Path("/d/skep"))


def test_what_a_user_has_written_overrides_the_places_of_a_rootless_node() -> None:
    arguments = parse_arguments(["--rootless", "--data-dir", "/big/skep"], {"HOME": "/home/ada"})
    assert combine(arguments, {}, {}).configuration.data_dir == Path("/big/skep")
    assert combine(
        parse_arguments(["--rootless"], {}), {"data-dir": "/toml"}, {}
    ).configuration.data_dir == Path("/toml")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"hosts": ["tcp://127.0.0.1:2376"]}, "docker -H ssh://USER@MACHINE"),
        ({"metrics-addr": "0.0.0.0:9323"}, "remove it, and read /metrics from the API socket"),
        ({"dashboard": "127.0.0.1:8443"}, "set it on a node of root"),
        ({"userns-remap": "default"}, "remove userns-remap"),
    ],
)
def test_what_needs_the_machines_network_or_users_is_refused_on_a_rootless_node(
    setting: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "pem"
    file.touch()
    given = setting | {f"tls-{name}": str(file) for name in ("cert", "key", "ca")}
    assert combine(parse_arguments([], {}), given, {})
    with pytest.raises(ConfigurationError, match=reason):
        combine(parse_arguments(["--rootless"], {}), given, {})


def test_mapped_users_are_refused_without_containers() -> None:
    with pytest.raises(ConfigurationError, match="use --executor oci"):
        combine(parse_arguments([], {}), {"executor": "process", "userns-remap": "default"}, {})
