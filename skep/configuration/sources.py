"""Reads flags, the TOML file and Docker's ``daemon.json``, in this order of precedence."""

import argparse
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from skep.configuration import values
from skep.configuration.configuration import Configuration, ConfigurationError, TcpHost, UnixHost
from skep.configuration.settings import SETTINGS, Setting
from skep.configuration.values import LOG_DRIVERS
from skep.model.networks.addresses import is_public, joined
from skep.paths import SOCKET_PATH_BYTES_MAX

DEFAULT_TOML = Path("/etc/skep/skep.toml")
DEFAULT_DAEMON_JSON = Path("/etc/docker/daemon.json")
_USERS_TOML = "skep/skep.toml"
_USERS_DAEMON_JSON = "docker/daemon.json"

_THE_ENGINES_OWN = frozenset({"hosts", "data_dir", "metrics_addr"})


class LoadedConfiguration(msgspec.Struct, frozen=True):
    """A configuration, and one sentence for each warning to its author."""

    configuration: Configuration
    warnings: tuple[str, ...] = ()


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """The command line: the files to read, and the given settings (by flag name, as written)."""

    toml: Path = DEFAULT_TOML
    toml_required: bool = False
    daemon_json: Path | None = DEFAULT_DAEMON_JSON
    daemon_json_required: bool = False
    flags: Mapping[str, Any] = {}
    is_rootless: bool = False
    defaults: Mapping[str, Any] = {}
    """Defaults by attribute that override the defaults of ``Configuration``."""


class UserPlaces(msgspec.Struct, frozen=True):
    """Places of an ordinary user's node: configuration files, data directory and API socket."""

    toml: Path
    daemon_json: Path
    data_dir: Path
    socket: Path

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Return the places by the XDG Base Directory Specification, where rootless Docker has its own.

        Sockets and other files of the node's processes are in the run directory of its namespaces, /run/skep.
        """
        home = Path(environment.get("HOME") or Path.home())
        configuration = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
        data = Path(environment.get("XDG_DATA_HOME") or home / ".local/share")
        runtime = Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
        return cls(
            configuration / _USERS_TOML,
            configuration / _USERS_DAEMON_JSON,
            data / "skep",
            runtime / "skep.sock",
        )


def parse_arguments(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Arguments:
    """Parse the command line of ``skep daemon``.  An unknown flag exits with usage, as argparse does."""
    # ``configuration.command`` has the help; the daemon itself does not import click.
    parser = argparse.ArgumentParser(prog="skep daemon", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--daemon-json")
    parser.add_argument("--rootless", action="store_true", default=None)
    for setting in SETTINGS:
        names = [*filter(None, [setting.short]), f"--{setting.name}"]
        if setting.repeats:
            parser.add_argument(*names, dest=setting.name, action="append")
        elif setting.name == "debug":
            parser.add_argument(*names, dest=setting.name, nargs="?", const="true")
        else:
            parser.add_argument(*names, dest=setting.name)
        if setting.former:
            parser.add_argument(f"--{setting.former}", dest=setting.name)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    toml, daemon_json = given.pop("config", None), given.pop("daemon_json", None)
    is_rootless = given.pop("rootless", False)
    users = UserPlaces.of(environment) if is_rootless else None
    default_json = users.daemon_json if users is not None else DEFAULT_DAEMON_JSON
    return Arguments(
        toml=Path(toml).absolute() if toml else users.toml if users is not None else DEFAULT_TOML,
        toml_required=bool(toml),
        daemon_json=default_json
        if daemon_json is None
        else Path(daemon_json).absolute()
        if daemon_json
        else None,
        daemon_json_required=bool(daemon_json),
        flags=given,
        is_rootless=is_rootless,
        defaults={"data_dir": users.data_dir, "hosts": (UnixHost(users.socket),)}
        if users is not None
        else {},
    )


def load(arguments: Arguments) -> LoadedConfiguration:
    """Load the configuration from flags, TOML and ``daemon.json``.

    Raises: ConfigurationError: with a sentence for each bad value.
    """
    toml = _toml(arguments.toml, required=arguments.toml_required)
    docker = _json(arguments.daemon_json, required=arguments.daemon_json_required)
    return _resolved(combine(arguments, toml, docker), arguments)


def _resolved(loaded: LoadedConfiguration, arguments: Arguments) -> LoadedConfiguration:
    """Return ``loaded`` with the real paths of its two directories.

    runc refuses a root file system below a symbolic link, and ``/var/run`` is a link on every distribution.
    """
    configuration = loaded.configuration
    configuration = msgspec.structs.replace(
        configuration,
        data_dir=Path(os.path.realpath(configuration.data_dir)),
        run_dir=Path(os.path.realpath(configuration.run_dir)),
    )
    if together := _problems_together(configuration, is_rootless=arguments.is_rootless):
        raise ConfigurationError(*together)
    return msgspec.structs.replace(loaded, configuration=configuration)


def combine(arguments: Arguments, toml: Mapping[str, Any], docker: Mapping[str, Any]) -> LoadedConfiguration:
    """Combine the sources: flags, then TOML, then ``daemon.json``, then defaults.

    With an engine socket, ``daemon.json`` belongs to that engine, so its hosts, data directory and metrics address are
    ignored.  Log options are ignored if they were written for another driver than the chosen one.
    """
    warnings: list[str] = []
    problems: list[str] = []
    renamed = {setting.former: setting.toml_key for setting in SETTINGS if setting.former}
    toml = {renamed.get(key, key): toml[key] for key in sorted(toml, key=renamed.__contains__, reverse=True)}
    by_toml_key = {setting.toml_key: setting for setting in SETTINGS}
    by_docker_key = {setting.docker_key: setting for setting in SETTINGS if setting.docker_key}
    problems += [
        f"{arguments.toml}: there is no setting {key!r}: {_advice(key, by_toml_key)}"
        for key in toml
        if key not in by_toml_key
    ]
    if unknown := sorted(key for key in docker if key not in by_docker_key):
        warnings.append(f"{arguments.daemon_json}: skep does not use {', '.join(unknown)}")
    has_engine = "engine-socket" in arguments.flags or "engine-socket" in toml

    fields: dict[str, Any] = dict(arguments.defaults)
    for setting in SETTINGS:
        if setting.name in arguments.flags:
            source, written = f"--{setting.name}", arguments.flags[setting.name]
        elif setting.toml_key in toml:
            source, written = f"{arguments.toml}: {setting.toml_key}", toml[setting.toml_key]
        elif setting.docker_key in docker and not (has_engine and setting.attribute in _THE_ENGINES_OWN):
            source, written = f"{arguments.daemon_json}: {setting.docker_key}", docker[setting.docker_key]
        else:
            continue
        try:
            fields[setting.attribute] = setting.read(written)
        except ValueError as error:
            if _is_wrong_in(toml, setting, error):
                source = f"{arguments.toml}: {setting.toml_key}"
            problems.append(f"{source} {error}")
    if problems:
        raise ConfigurationError(*problems)
    configuration = Configuration(**fields)
    if other := _driver_of_options(arguments, toml, docker, configuration.log_driver):
        warnings.append(f"log-opts is not used, because it is for log-driver {other}")
        configuration = msgspec.structs.replace(configuration, log_opts={})
    if unused := _unused_hosts(configuration, toml):
        warnings.append(f"{arguments.toml}: hosts is not used, because --host is given: {', '.join(unused)}")
    if together := _problems_together(configuration, is_rootless=arguments.is_rootless):
        raise ConfigurationError(*together)
    if configuration.log_driver not in LOG_DRIVERS:
        warnings.append(
            f"log driver {configuration.log_driver} is not supported: containers log as json-file, "
            f"set log-driver to one of {', '.join(LOG_DRIVERS)} to be without this warning"
        )
        configuration = msgspec.structs.replace(configuration, log_driver="json-file", log_opts={})
    return LoadedConfiguration(configuration, tuple(warnings))


def _driver_of_options(
    arguments: Arguments, toml: Mapping[str, Any], docker: Mapping[str, Any], driver: str
) -> str:
    """Return the log driver that the log options were written for, if it is not ``driver``, or an empty text."""
    sources = (
        (arguments.flags, "log-driver", "log-opt"),
        (toml, "log-driver", "log-opts"),
        (docker, "log-driver", "log-opts"),
    )
    first = next((number for number, (one, _, options) in enumerate(sources) if options in one), len(sources))
    written = next((one[name] for one, name, _ in sources[first:] if name in one), driver)
    return str(written) if written != driver else ""


def _is_wrong_in(toml: Mapping[str, Any], setting: Setting, error: ValueError) -> bool:
    """Return whether the file has the value of a flag that causes ``error``, so that it is corrected in the file.

    Programs that start nodes repeat hosts of the file as flags, to which they add their own.
    """
    if setting.toml_key not in toml:
        return False
    try:
        setting.read(toml[setting.toml_key])
    except ValueError as in_file:
        return str(in_file) == str(error)
    return False


def _unused_hosts(configuration: Configuration, toml: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the hosts in the file that flags have replaced.

    The caller warns about them, because a node that ignores a host in its file looks broken.
    """
    try:
        written = values.hosts(toml.get("hosts", ()))
    except ValueError:
        return ()
    return tuple(str(host) for host in written if host not in configuration.api_hosts)


def _advice(key: str, known: Mapping[str, object]) -> str:
    """Return advice about an unknown key: the nearest known key if there is a similar one."""
    from difflib import get_close_matches  # rarely needed, and 0.15 MB in every process

    near = get_close_matches(key.replace("_", "-"), known, n=1)
    return f"did you mean {near[0]!r}?" if near else "correct or remove it"


def _problems_together(configuration: Configuration, *, is_rootless: bool) -> list[str]:
    """Return problems of settings that are valid alone but not together, or not on a rootless node."""
    problems = _rootless_problems(configuration) if is_rootless else []
    if configuration.userns_remap and configuration.executor != "oci":
        problems.append(
            f"userns-remap maps users of containers, and the executor {configuration.executor} runs none: "
            "remove userns-remap, or use --executor oci"
        )
    over_tcp = [host for host in configuration.api_hosts if isinstance(host, TcpHost)]
    tls = (configuration.tls_cert, configuration.tls_key, configuration.tls_ca)
    if over_tcp and None in tls:
        problems.append(
            f"{over_tcp[0]} gives root on this machine to every client that reaches it: "
            f"set --tls-cert, --tls-key and --tls-ca so that clients are authenticated, or use unix://"
        )
    elif any(tls) and None in (tls if configuration.dashboard is None else tls[:2]):
        problems.append("--tls-cert, --tls-key and --tls-ca belong together: set all three or none")
    if configuration.dashboard is not None:
        address, port = configuration.dashboard
        if not any(tls):
            problems.append("--dashboard is served over TLS: set --tls-cert and --tls-key")
        if address and is_public(address) and not configuration.dashboard_public:
            problems.append(
                f"--dashboard {joined(address, port)} is a public address: set --dashboard-public if it is to be "
                "served to the internet, or choose a private one"
            )
    longest = configuration.paths.handover_socket
    if len(str(longest).encode()) > SOCKET_PATH_BYTES_MAX:
        problems.append(
            f"run-dir is too long: {longest} has more than {SOCKET_PATH_BYTES_MAX} bytes, choose a shorter one"
        )
    if configuration.data_dir == configuration.run_dir:
        problems.append(
            f"data-dir and run-dir are both {configuration.data_dir}: choose a run-dir on tmpfs, like /run/skep"
        )
    return problems


def _rootless_problems(configuration: Configuration) -> list[str]:
    """Return the settings that need the machine's network or users, which a rootless node does not have."""
    problems = [
        f"{host} is in the rootless node's own network, where no client reaches it: "
        "use unix://, and from other machines docker -H ssh://USER@MACHINE"
        for host in configuration.api_hosts
        if isinstance(host, TcpHost)
    ]
    if configuration.metrics_addr is not None:
        problems.append(
            f"--metrics-addr {joined(*configuration.metrics_addr)} is in the rootless node's own network, where "
            "Prometheus does not reach it: remove it, and read /metrics from the API socket"
        )
    if configuration.dashboard is not None:
        problems.append(
            "--dashboard is served by managers, and a rootless node is never one: set it on a node of root"
        )
    if configuration.userns_remap:
        problems.append(
            "userns-remap is for nodes of root, and a rootless node maps users already: remove userns-remap"
        )
    return problems


def _toml(path: Path, *, required: bool) -> Mapping[str, Any]:
    text = _text(path, required=required)
    if text is None:
        return {}
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}, at {_failing_key(text, error)!r}") from error


def _failing_key(text: str, error: tomllib.TOMLDecodeError) -> str:
    """Return the key or table at which the parser stopped, without the value, which may be secret.

    The parser names only the line at which the value ends.
    """
    lines = text.splitlines()
    place = re.search(r"at line (\d+)", str(error))
    end = min(int(place[1]), len(lines)) if place else len(lines)
    begin = next(number for number in range(end - 1, -1, -1) if _is_toml("\n".join(lines[:number])))
    return lines[begin].partition("=")[0].strip()[:80]


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _json(path: Path | None, *, required: bool) -> Mapping[str, Any]:
    text = _text(path, required=required) if path is not None else None
    if not text or not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path} is not a JSON object: {error}") from error


def _text(path: Path, *, required: bool) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if required:
            raise ConfigurationError(f"{path} does not exist: create it or correct the flag") from error
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
