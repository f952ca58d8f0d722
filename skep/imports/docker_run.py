"""Converts ``docker run ...`` to the keys of a Compose service."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from skep.errors import InvalidArgument
from skep.stack.project import NODES_NETWORKS

_LISTS: Final = {
    "add-host": "extra_hosts",
    "cap-add": "cap_add",
    "cap-drop": "cap_drop",
    "device": "devices",
    "dns": "dns",
    "dns-opt": "dns_opt",
    "dns-option": "dns_opt",
    "dns-search": "dns_search",
    "env": "environment",
    "env-file": "env_file",
    "expose": "expose",
    "group-add": "group_add",
    "label": "labels",
    "link": "links",
    "publish": "ports",
    "security-opt": "security_opt",
    "sysctl": "sysctls",
    "tmpfs": "tmpfs",
    "volume": "volumes",
    "volumes-from": "volumes_from",
}
_VALUES: Final = {
    "cgroup-parent": "cgroup_parent",
    "cpu-shares": "cpu_shares",
    "cpus": "cpus",
    "cpuset-cpus": "cpuset",
    "entrypoint": "entrypoint",
    "hostname": "hostname",
    "ipc": "ipc",
    "mac-address": "mac_address",
    "memory": "mem_limit",
    "memory-reservation": "mem_reservation",
    "memory-swap": "memswap_limit",
    "oom-score-adj": "oom_score_adj",
    "pid": "pid",
    "pids-limit": "pids_limit",
    "platform": "platform",
    "restart": "restart",
    "runtime": "runtime",
    "shm-size": "shm_size",
    "stop-signal": "stop_signal",
    "user": "user",
    "userns": "userns_mode",
    "uts": "uts",
    "workdir": "working_dir",
}
_SWITCHES: Final = {
    "init": "init",
    "interactive": "stdin_open",
    "privileged": "privileged",
    "read-only": "read_only",
    "tty": "tty",
}
_WITHOUT_EFFECT: Final = ("detach", "rm", "sig-proxy")
"""Switches of the command that do not concern the container."""
_OTHER_SWITCHES: Final = (
    "publish-all",
    "oom-kill-disable",
    "no-healthcheck",
    "disable-content-trust",
    "quiet",
)
"""Switches without a key in a stack file."""
_SHORT: Final = {
    "c": "cpu-shares",
    "d": "detach",
    "e": "env",
    "h": "hostname",
    "i": "interactive",
    "l": "label",
    "m": "memory",
    "p": "publish",
    "t": "tty",
    "u": "user",
    "v": "volume",
    "w": "workdir",
}
_OTHER_VALUES: Final = (
    "name",
    "net",
    "network",
    "log-driver",
    "log-opt",
    "ulimit",
    "stop-timeout",
    "cidfile",
)
_LONG: Final = frozenset({*_LISTS, *_VALUES, *_SWITCHES, *_WITHOUT_EFFECT, *_OTHER_VALUES})


class ConvertedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A converted command: the keys of its service, the container's name, and notes (key and text)."""

    entry: dict[str, Any]
    name: str
    notes: tuple[tuple[str, str], ...]


def service_of(words: Sequence[str]) -> ConvertedRun:
    """Convert the words after ``docker run``.  Raises: InvalidArgument: unknown option, or no image."""
    entry: dict[str, Any] = {}
    notes: list[tuple[str, str]] = []
    given: dict[str, list[str]] = {}
    rest = list(words)
    for name, value in _options(rest):
        if name in _LISTS:
            entry.setdefault(_LISTS[name], []).append(value)
        elif name in _VALUES:
            entry[_VALUES[name]] = value
        elif name in _SWITCHES:
            entry[_SWITCHES[name]] = value != "false"
        elif name in _OTHER_VALUES:
            given.setdefault(name, []).append(value)
        elif name not in _WITHOUT_EFFECT:
            notes.append((name, f"dropped: --{name} has no key in a stack file"))
    if not rest:
        raise InvalidArgument("docker run names no image")
    entry["image"], *command = rest
    if command:
        entry["command"] = command
    entry |= _others(given)
    name = given.get("name", [""])[-1]
    return ConvertedRun(entry=entry, name=name, notes=tuple(notes))


def _options(rest: list[str]) -> Iterator[tuple[str, str]]:
    """Take the options before the image from ``rest``."""
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            return
        name, separator, value = word.lstrip("-").partition("=")
        # Before 2014 names had one dash as well: -rm, -name.
        if word.startswith("--") or name in _LONG:
            yield name, value if separator else _value_of(name, rest)
            continue
        yield from _short_options(word[1:], rest)


def _short_options(letters: str, rest: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the options in a word such as ``-it``, ``-p 80:80``, ``-p80:80`` or ``-e=A=1``, with their values."""
    while letters:
        letter, letters = letters[0], letters[1:]
        name = _SHORT.get(letter)
        if letter == "P":
            yield "publish-all", "true"
            continue
        if letter == "a":
            yield "attach", letters or (rest.pop(0) if rest else "")
            return
        if name is None:
            raise InvalidArgument(f"docker run has no option -{letter}")
        if name in _SWITCHES or name in _WITHOUT_EFFECT:
            yield name, "true"
            continue
        yield name, letters.removeprefix("=") if letters else _value_of(name, rest)
        return


def _value_of(name: str, rest: list[str]) -> str:
    if name in _SWITCHES or name in _WITHOUT_EFFECT or name in _OTHER_SWITCHES:
        return "true"
    if not re.fullmatch(r"[a-z0-9-]+", name):
        raise InvalidArgument(f"docker run has no option --{name}")
    if not rest:
        raise InvalidArgument(f"docker run: --{name} needs a value")
    return rest.pop(0)


def _others(given: dict[str, list[str]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    network = (given.get("net") or given.get("network") or [""])[-1]
    if network in NODES_NETWORKS:
        made["network_mode"] = network
    elif network and not network.startswith("container:"):
        made["networks"] = [network]
    elif network:
        made["network_mode"] = network
    options = dict(one.partition("=")[::2] for one in given.get("log-opt", ()))
    if "log-driver" in given or options:
        driver = given.get("log-driver", [""])[-1]
        made["logging"] = ({"driver": driver} if driver else {}) | ({"options": options} if options else {})
    if limits := given.get("ulimit"):
        made["ulimits"] = {name: _ulimit(text) for name, _, text in (one.partition("=") for one in limits)}
    if timeout := given.get("stop-timeout"):
        made["stop_grace_period"] = f"{timeout[-1]}s"
    return made


def _ulimit(text: str) -> Any:
    soft, separator, hard = text.partition(":")
    if not re.fullmatch(r"-?[0-9]{1,19}(:-?[0-9]{1,19})?", text):
        raise InvalidArgument(f"docker run: --ulimit needs NAME=SOFT[:HARD], not {text!r}")
    return {"soft": int(soft), "hard": int(hard)} if separator else int(soft)
