"""Converts units of CoreOS's fleet: systemd units that run containers and choose their machines in ``[X-Fleet]``.

Source: coreos/fleet, Documentation/unit-files-and-scheduling.md; systemd.unit(5), "Specifiers".
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.imports.docker_run import ConvertedRun, service_of
from skep.imports.document import Imported, Note, accepted, escaped
from skep.imports.fleet_processes import is_converted, process_of

_FLEET: Final = "X-Fleet"
_SECTIONS: Final = ("X-Fleet", "X-ConditionMachine")
_SYSTEMD_SETTINGS: Final = {
    "User", "Group", "KillMode", "KillSignal", "TimeoutStartSec", "TimeoutSec", "RemainAfterExit", "Type",
    "NotifyAccess", "SyslogIdentifier", "StandardOutput", "StandardError", "StartLimitInterval", "StartLimitBurst",
    "LimitNOFILE",
}  # fmt: skip
"""Settings of [Service] about the process of the docker command, which the cluster does not run."""
_READ: Final = {
    "ExecStart", "ExecStartPre", "ExecStartPost", "ExecStop", "ExecStopPost", "ExecReload", "Environment",
    "EnvironmentFile", "Restart", "RestartSec", "TimeoutStopSec",
}  # fmt: skip
_UNIT_SETTINGS: Final = {
    "Description",
    "Documentation",
    "After",
    "Requires",
    "Wants",
    "BindsTo",
    "DefaultDependencies",
}
_SPECIFIERS: Final = {"i": "{{.Task.Slot}}", "H": "{{.Node.Hostname}}", "m": "{{.Node.ID}}"}
"""Systemd's specifiers, and the placeholders that the cluster expands in the environment, host name and mounts."""
_FILLED_IN: Final = ("environment", "hostname", "volumes")
_CONDITIONS: Final = {
    "always": "any",
    "on-success": "any",
    "on-failure": "on-failure",
    "on-abnormal": "on-failure",
    "on-abort": "on-failure",
    "on-watchdog": "on-failure",
    "no": "none",
}
_PREPARATIONS: Final = ("kill", "rm", "pull", "stop", "start", "wait")
"""Docker commands before and after a run that the cluster performs itself."""


class Unit(msgspec.Struct, frozen=True):
    """One unit file.  ``settings`` has the values of each section and key, in order."""

    name: str
    settings: Mapping[tuple[str, str], tuple[str, ...]]

    def all(self, section: str, key: str) -> tuple[str, ...]:
        """Return the values of a setting.  An empty value in the file discards those before it."""
        return self.settings.get((section, key), ())

    def last(self, section: str, key: str) -> str:
        """Return the last value of a setting, the one in effect, or an empty text if it is not set."""
        found = self.all(section, key)
        return found[-1] if found else ""


def unit_of(text: str, name: str) -> Unit:
    """Read a unit file.  Raises: InvalidArgument: a line is neither a section nor a setting; it names the line.

    Source: systemd.syntax(7).
    """
    settings: dict[tuple[str, str], tuple[str, ...]] = {}
    section, pending, began = "", "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith(("#", ";")) or (not line and not pending):
            continue
        began = began if pending else number
        pending += line.removesuffix("\\") + (" " if line.endswith("\\") else "")
        if line.endswith("\\"):
            continue
        line, pending = pending.strip(), ""
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
            continue
        key, separator, value = (part.strip() for part in line.partition("="))
        if not separator or not key or not section:
            raise InvalidArgument(f"{name}:{began}: expected [SECTION] or KEY=VALUE, not {line!r}")
        before = settings.get((section, key), ())
        settings[section, key] = (*before, value) if value else ()
    return Unit(name, settings)


class _Service(msgspec.Struct, frozen=True):
    name: str
    unit: Unit
    instances: int
    """Number of instances of the unit's template among the files.  0 without a template or without instances."""
    files: tuple[str, ...]
    """Names of the unit and of its template's other instances."""


def imported(texts: Mapping[str, str], stack: str, *, has_processes: bool = False) -> Imported:
    """Convert units to a stack file.

    Args:
        texts: the files' contents by their names (``apache@.service``).
        has_processes: whether units without a container become plain processes.

    Raises: InvalidArgument: a file is not a unit, or does not run a container.
    """
    notes: list[Note] = []
    services = list(_services([unit_of(text, name) for name, text in texts.items()]))
    made: dict[str, Any] = {"name": stack, "services": {}}
    files = {service.name: service.files for service in services}
    before = _started_before(services)
    for service in services:
        if service.name in made["services"]:
            raise InvalidArgument(f"{service.unit.name}: there is a unit {service.name} already")
        made["services"][service.name] = _Conversion(service, files, before, notes, has_processes).entry()
    volumes = {
        source: None
        for entry in made["services"].values()
        for source, separator, _ in (str(one).partition(":") for one in entry.get("volumes", ()))
        if separator and not re.match(r"[./~]", source)
    }
    if volumes:
        made["volumes"] = volumes
    networks = {
        one: {"external": True} for entry in made["services"].values() for one in entry.get("networks", ())
    }
    if networks:
        made["networks"] = networks
    result = accepted(made)
    return replace(result, notes=(*notes, *result.notes))


def _services(units: Sequence[Unit]) -> Iterator[_Service]:
    """Merge the instances of each template into one service."""
    seen: dict[str, list[Unit]] = {}
    for unit in units:
        if not unit.name.endswith(".service"):
            raise InvalidArgument(f"{unit.name}: only units of services can run in a cluster")
        seen.setdefault(unit.name.removesuffix(".service").partition("@")[0], []).append(unit)
    for name, found in seen.items():
        instances = sum("@" in unit.name and not unit.name.endswith("@.service") for unit in found)
        if len(found) > 1 and not all("@" in unit.name for unit in found):
            raise InvalidArgument(f"{found[0].name} and {found[1].name} would be one service")
        if any(unit.settings != found[0].settings for unit in found):
            raise InvalidArgument(f"{found[0].name}: units of one template differ")
        if not re.fullmatch(r"[a-zA-Z0-9._-]+", name):
            raise InvalidArgument(
                f"{found[0].name}: a service's name has letters, digits, dots, dashes and underscores only"
            )
        yield _Service(name, found[0], instances, tuple(unit.name for unit in found))


def _listed(unit: Unit, key: str) -> Iterator[str]:
    """Yield the units in the lists of a setting of ``[Unit]``."""
    return (word for line in unit.all("Unit", key) for word in line.split())


def _name_of(word: str) -> str:
    """Return the name of the service of a unit."""
    return word.removesuffix(".service").partition("@")[0]


def _started_before(services: Sequence[_Service]) -> Mapping[str, set[str]]:
    """Return the services that systemd starts before each service, by ``After`` alone, as in systemd."""
    after = {one.name: {*map(_name_of, _listed(one.unit, "After"))} - {one.name} for one in services}
    found: dict[str, set[str]] = {}
    for name in after:
        pending, found[name] = [name], set()
        while pending:
            new = after.get(pending.pop(), set()) - found[name]
            found[name] |= new
            pending += new
    return found


class _Conversion:
    def __init__(
        self,
        service: _Service,
        files: Mapping[str, tuple[str, ...]],
        before: Mapping[str, set[str]],
        notes: list[Note],
        has_processes: bool = False,
    ) -> None:
        """``before``: result of ``_started_before``."""
        self._service = service
        self._unit = service.unit
        self._files = files
        self._before = before
        self._notes = notes
        self._has_processes = has_processes
        self._is_process = False

    def _note(self, key: str, text: str) -> None:
        self._notes.append(Note(f"services.{self._service.name}", f"{key}: {text}"))

    def entry(self) -> dict[str, Any]:
        run = self._run()
        entry = dict(run.entry)
        for key, text in run.notes:
            self._note(key if self._is_process else f"ExecStart --{key}", text)
        if environment := self._environment(entry.pop("environment", ())):
            entry["environment"] = environment
        if files := [one.removeprefix("-") for one in self._unit.all("Service", "EnvironmentFile")]:
            entry["env_file"] = [*files, *entry.get("env_file", ())]
            self._note("EnvironmentFile", "each deploy reads this file on the machine where the deploy runs")
        if grace := self._seconds("TimeoutStopSec") or self._stop_seconds():
            entry["stop_grace_period"] = grace
        depends_on = [*self._links(entry), *self._after()]
        if depends_on:
            entry["depends_on"] = list(dict.fromkeys(depends_on))
        entry["deploy"] = self._deploy()
        if affinities := {key: ",".join(names) for key, names in self._affinities().items() if names}:
            entry["x-skep"] = affinities
        self._note_rest()
        return {key: self._filled_in(key, one) for key, one in entry.items() if one not in ({}, [])}

    def _run(self) -> ConvertedRun:
        commands = self._unit.all("Service", "ExecStart")
        if len(commands) != 1:
            raise InvalidArgument(
                f"{self._unit.name}: expected one ExecStart that runs a container, not {len(commands)}"
            )
        words = command = _words(commands[0], self._unit.name)
        if words[:2] == ["/bin/sh", "-c"] or words[:2] == ["/bin/bash", "-c"]:
            words = _words(" ".join(words[2:3]).removeprefix("exec "), self._unit.name)
        if len(words) < 2 or words[0].rpartition("/")[2] != "docker" or words[1] != "run":
            if not self._has_processes:
                raise InvalidArgument(
                    f"{self._unit.name}: ExecStart does not begin with docker run: {commands[0]!r}. "
                    "Add --processes to run programs of your machines without an image."
                )
            self._is_process = True
            settings = partial(self._unit.all, "Service")
            keys = [key for section, key in self._unit.settings if section == "Service"]
            return process_of(command, settings, keys, self._unit.name)
        try:
            return service_of(words[2:])
        except InvalidArgument as error:
            raise InvalidArgument(f"{self._unit.name}: {error}") from None

    def _environment(self, options: Iterable[str]) -> list[str]:
        """Return the unit's variables, then ``options``: ``NAME=VALUE`` of ``-e``, or ``NAME`` for the unit's value."""
        found = [
            word
            for line in self._unit.all("Service", "Environment")
            for word in _words(line, self._unit.name)
        ]
        names = {word.partition("=")[0] for word in found}
        for option in options:
            if "=" in option:
                found.append(option)
            elif option not in names:
                found.append(option)
                text = f"{option} has no value here: each deploy uses the value in its own environment"
                self._note("ExecStart --env", text)
        return found

    def _stop_seconds(self) -> str:
        for command in self._unit.all("Service", "ExecStop"):
            words = _words(command.removeprefix("-"), self._unit.name)
            for at, word in enumerate(words):
                if found := re.fullmatch(r"(?:-t|--time)=?([0-9]+)?", word):
                    value = found[1] or (words[at + 1] if at + 1 < len(words) else "")
                    return f"{value}s" if value.isascii() and value.isdigit() else ""
        return ""

    def _seconds(self, key: str) -> str:
        text = self._unit.last("Service", key)
        if not text or text in ("0", "infinity"):
            return ""
        match = re.fullmatch(r"([0-9]+)(ms|s|sec|min|m|h)?", text.replace(" ", ""))
        if match is None:
            self._note(key, f"dropped: {text!r} is not a number of seconds")
            return ""
        unit = {"sec": "s", "min": "m", None: "s"}.get(match[2], match[2])
        return f"{match[1]}{unit}"

    def _links(self, entry: dict[str, Any]) -> Iterator[str]:
        for text in entry.pop("links", ()):
            target = text.partition(":")[0].partition("@")[0]
            if target in self._files:
                yield target
            else:
                self._note("ExecStart --link", f"dropped: {target} is not among the units")

    def _after(self) -> Iterator[str]:
        """Yield the services to wait for.  A unit that starts after this one is wanted, and not waited for."""
        own = self._service.name
        words = {
            word for key in ("After", "Requires", "Wants", "BindsTo") for word in _listed(self._unit, key)
        }
        for word in sorted(words):
            name = _name_of(word)
            if name in self._files and name != own:
                if name in self._before[own] or own not in self._before[name]:
                    yield name
            elif name not in (
                "docker",
                "network-online.target",
                "network.target",
                "etcd",
                "etcd2",
                "fleet",
                "docker.socket",
            ):
                self._note("After", f"dropped: {word} is not among the units")

    # -- where ----------------------------------------------------------------------------------------------------

    def _deploy(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        is_job = self._unit.last("Service", "Type") == "oneshot"
        if is_job or self._is_global:
            made["mode"] = ("global" if self._is_global else "replicated") + ("-job" if is_job else "")
        if self._service.instances > 1 and not self._is_global:
            made["replicas"] = self._service.instances
        elif self._unit.name.endswith("@.service") and not self._is_global:
            self._note(
                "replicas", "the files have no instances of this template, so the service has one task"
            )
        restart = self._restart(is_job)
        if restart:
            made["restart_policy"] = restart
        if placement := self._placement():
            made["placement"] = placement
        return made

    def _restart(self, is_job: bool) -> dict[str, Any]:
        word = self._unit.last("Service", "Restart") or "no"
        condition = _CONDITIONS.get(word)
        if condition is None:
            self._note("Restart", f"dropped: {word!r} is not known")
            return {}
        if is_job and condition == "any":
            condition = "on-failure"
        delay = self._seconds("RestartSec")
        return {"condition": condition} | ({"delay": delay} if delay else {})

    @property
    def _is_global(self) -> bool:
        return any(
            self._unit.last(section, "Global").lower() in ("true", "yes", "1", "on") for section in _SECTIONS
        )

    def _placement(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        metadata: list[str] = []
        for key, value in self._located():
            match key:
                case "MachineMetadata":
                    metadata += _words(value, self._unit.name)
                case "Global":
                    pass
                case _ if self._is_global:
                    self._note(f"{key}={value}", "dropped: a global unit may only have MachineMetadata")
                case "MachineID" | "MachineBootID":
                    self._note(
                        key, f"dropped: nodes of a cluster do not have the id {value}. Give the node a label"
                    )
                case "Conflicts":
                    if self._matches(self._service.files, value):
                        made["max_replicas_per_node"] = 1
                case "Replaces" | "Weight":
                    self._note(key, "dropped: this setting does not exist")
                case _ if key != "MachineOf":
                    self._note(f"[{_FLEET}] {key}", "not known, dropped")
        constraints = list(_metadata(metadata))
        return made | ({"constraints": constraints} if constraints else {})

    def _affinities(self) -> dict[str, list[str]]:
        """Return the units of ``MachineOf`` and ``Conflicts`` as services near which and apart from which to run."""
        found: dict[str, list[str]] = {"affinity": [], "anti-affinity": []}
        for key, value in () if self._is_global else self._located():
            if key == "MachineOf":
                near = [name for name in self._matching(value) if name != self._service.name]
                found["affinity"] += near
                if not near:
                    self._note(f"{key}={value}", "dropped: no other unit has this name")
                elif len(self._files[near[0]]) > 1:
                    text = f"tasks run on nodes with any task of {near[0]}, not with one instance"
                    self._note(f"{key}={value}", text)
            elif key == "Conflicts":
                apart = self._matching(value)
                found["anti-affinity"] += [name for name in apart if name != self._service.name]
                if not apart:
                    self._note(f"{key}={value}", "dropped: none of the units has such a name")
        return {key: list(dict.fromkeys(names)) for key, names in found.items()}

    def _matching(self, pattern: str) -> list[str]:
        return [name for name, files in self._files.items() if self._matches(files, pattern)]

    def _matches(self, files: Iterable[str], pattern: str) -> bool:
        """Return whether fleet's pattern matches one of the units.  A template stands for its first instance."""
        return any(fnmatchcase(file.replace("@.", "@1."), pattern) for file in files)

    def _located(self) -> Iterator[tuple[str, str]]:
        """Yield the settings that select machines, by their present names, with systemd's specifiers expanded."""
        for (section, key), values in self._unit.settings.items():
            if section in _SECTIONS:
                present = key.removeprefix("X-Condition").removeprefix("X-")
                yield from ((present, self._expanded(value)) for value in values)

    def _expanded(self, text: str) -> str:
        prefix, _, instance = self._unit.name.removesuffix(".service").partition("@")
        unit = self._unit.name
        known = {"n": unit, "N": unit.removesuffix(".service"), "p": prefix, "i": instance or "1", "%": "%"}
        return re.sub(r"%([nNpi%])", lambda match: known[match[1]], text)

    # -- the rest -------------------------------------------------------------------------------------------------

    def _note_rest(self) -> None:
        for key in ("ExecStartPre", "ExecStartPost", "ExecStop", "ExecStopPost", "ExecReload"):
            for command in self._unit.all("Service", key):
                words = _words(command.removeprefix("-"), self._unit.name)
                is_docker = len(words) > 1 and words[0].rpartition("/")[2] == "docker"
                if not (is_docker and words[1] in _PREPARATIONS):
                    self._note(key, f"dropped: {command!r} is not part of the container")
        for section, key in self._unit.settings:
            if section == "Service" and self._is_process:
                if key not in _READ and not is_converted(key):
                    self._note(f"[Service] {key}", "dropped: a plain process does not have this setting")
            elif section == "Service" and key not in _READ | _SYSTEMD_SETTINGS:
                self._note(f"[Service] {key}", "dropped: it only affects the process of the docker command")
            elif section == "Unit" and key not in _UNIT_SETTINGS:
                self._note(f"[Unit] {key}", "dropped: it only affects systemd units")
            elif section not in ("Unit", "Service", "Install", *_SECTIONS):
                self._note(f"[{section}]", "not known, dropped")

    def _filled_in(self, key: str, value: Any) -> Any:
        """Return ``value`` with systemd's specifiers replaced by the cluster's placeholders or by text."""
        if isinstance(value, str):
            return self._text(key, value)
        if isinstance(value, list):
            return [self._filled_in(key, one) for one in value]
        if isinstance(value, dict):
            return {name: self._filled_in(key, one) for name, one in value.items()}
        return value

    def _text(self, key: str, text: str) -> str:
        prefix = self._unit.name.removesuffix(".service").partition("@")[0]

        def one(match: "re.Match[str]") -> str:
            letter = match[1]
            if letter == "%":
                return "%"
            if letter == "p":
                return prefix
            if letter in ("n", "N"):
                return self._service.name
            if letter in _SPECIFIERS and key in _FILLED_IN:
                return _SPECIFIERS[letter]
            self._note(key, f"%{letter} is not supported: fix {text!r} by hand")
            return match[0]

        if "$" in text:
            self._note(key, f"the container gets {text!r} unchanged: systemd would replace its variables")
        return escaped(re.sub(r"%(.)", one, text))


def _words(command: str, name: str) -> list[str]:
    try:
        return shlex.split(command.lstrip("-@+!"))
    except ValueError as error:
        raise InvalidArgument(f"{name}: {command!r}: {error}") from None


def _metadata(words: Iterable[str]) -> Iterator[str]:
    """Yield constraints for metadata.  A machine needs all keys, with one of the values of each."""
    wanted: dict[str, list[str]] = {}
    for word in words:
        key, _, value = word.partition("=")
        wanted.setdefault(key, []).append(value)
    for key, values in wanted.items():
        if len(values) == 1:
            yield f"node.labels.{key}=={values[0]}"
        else:
            yield f"node.labels.{key} in ({', '.join(values)})"
