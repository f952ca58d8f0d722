"""The AppArmor profile that is generated, what of the kernel's words is read, and who gets it."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from skep.agent.executor.adapter import _security_options
from skep.engine.capacity import Programs, capacity_of, thermal_throttles
from skep.engine.confinement import apparmor
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.confinement.users import ProcessUser
from skep.engine.containers.container import ExecConfig
from skep.engine.runtime.runtime_spec import exec_process
from skep.errors import FailedPrecondition
from skep.model.container import AppArmorOpts, Privileges
from tests.support.engine.oci_rig import Machine, memory_engine, new_container
from tests.unit.engine.test_specification import ALL_CAPACITY, a_container, built

CONFINING = replace(ALL_CAPACITY, has_apparmor=True)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    apparmor.is_supported.cache_clear()
    yield
    apparmor.is_supported.cache_clear()


def test_the_profile_denies_what_dockers_does() -> None:
    text = apparmor.profile_text("docker-default", "skepd")
    assert text.startswith(
        '@{PROC}=/proc/\nprofile "docker-default" flags=(attach_disconnected,mediate_deleted) {\n'
    )
    rules = [
        line.strip() for line in text.splitlines() if line.endswith(",") and not line.strip().startswith("#")
    ]
    assert {one for one in rules if "/" not in one} == {
        *("network,", "deny network alg,", "capability,", "file,", "umount,", "deny mount,"),
        *("signal (receive) peer=unconfined,", "signal (receive) peer=runc,", "signal (receive) peer=crun,"),
        *('signal (receive) peer="skepd",', 'signal (send,receive) peer="docker-default",'),
        'ptrace (trace,tracedby,read,readby) peer="docker-default",',
    }
    denied = [one for one in rules if "/" in one]
    assert len(denied) == 11
    assert all(one.startswith("deny ") for one in denied)
    assert text.endswith("}\n")


def test_what_the_machine_has_is_included() -> None:
    text = apparmor.profile_text("p", is_included=lambda _: True)
    assert text.startswith("abi <abi/3.0>,\n#include <tunables/global>\nprofile")
    assert "  #include <abstractions/base>\n" in text


@pytest.mark.skipif(shutil.which("apparmor_parser") is None, reason="the parser is not installed")
def test_the_parser_takes_the_profile() -> None:
    text = apparmor.profile_text("docker-default")
    subprocess.run(("apparmor_parser", "-QK"), input=text, text=True, check=True)


def test_the_kernels_words_are_read_as_they_are() -> None:
    listed = "docker-default (enforce)\na profile (with) spaces (complain)\nbare\n"
    assert apparmor.is_loaded(listed, "docker-default")
    assert apparmor.is_loaded(listed, "a profile (with) spaces")
    assert apparmor.is_loaded(listed, "bare")
    assert not apparmor.is_loaded(listed, "docker")
    assert apparmor.label_of("unconfined\n") == "unconfined"


def test_a_machine_without_apparmor_needs_no_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_machine_with_apparmor(monkeypatch, tmp_path, parser="exit 1")
    assert apparmor.is_supported(tmp_path)
    none = tmp_path / "none"
    assert (apparmor.is_supported(none), apparmor.problem(none)) == (False, "")


def a_machine_with_apparmor(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *, parser: str, loaded: str = ""
) -> Path:
    """Returns the path to which its parser, which runs the shell commands ``parser``, writes the profile."""
    (directory / "apparmor_parser").write_text(f"#!/bin/sh\n{parser}\n")
    (directory / "apparmor_parser").chmod(0o755)
    enabled, profiles = (
        directory / "module/apparmor/parameters/enabled",
        directory / "kernel/security/apparmor/profiles",
    )
    for path, text in ((enabled, "Y\n"), (profiles, loaded)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.delenv("container", raising=False)
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    return directory / "told"


def test_the_profile_is_loaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reported = a_machine_with_apparmor(
        monkeypatch, tmp_path, parser=f'echo "$@" > {tmp_path}/told; cat >> {tmp_path}/told'
    )
    assert (apparmor.is_supported(tmp_path), apparmor.problem(tmp_path)) == (True, "")
    assert reported.read_text().startswith("-Kr\n")
    assert 'profile "docker-default"' in reported.read_text()


def test_a_profile_that_is_there_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reported = a_machine_with_apparmor(
        monkeypatch, tmp_path, parser=f"touch {tmp_path}/told", loaded="docker-default (enforce)\n"
    )
    assert apparmor.problem(tmp_path) == ""
    assert not reported.exists()


async def test_a_profile_that_is_refused_keeps_containers_from_starting_unconfined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_machine_with_apparmor(monkeypatch, tmp_path, parser="cat > /dev/null; echo 'syntax error' >&2; exit 1")
    refused = "AppArmor enabled on system but the docker-default profile could not be loaded: syntax error"
    assert apparmor.problem(tmp_path) == refused
    engine = memory_engine(tmp_path, Machine(tmp_path))
    async with engine.running():
        with pytest.raises(FailedPrecondition, match="could not be loaded: syntax error"):
            await engine.add(new_container("confined"))
        unconfined = new_container("unconfined")
        config = replace(unconfined.config, apparmor="unconfined")
        container = await engine.add(replace(unconfined, config=config))
    written = (tmp_path / "bundles" / container.id / "config.json").read_bytes()
    assert msgspec.json.decode(written)["process"]["apparmorProfile"] == "unconfined"


async def test_a_profile_that_was_unloaded_is_loaded_for_the_next_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profiles = tmp_path / "kernel/security/apparmor/profiles"
    reported = a_machine_with_apparmor(
        monkeypatch,
        tmp_path,
        parser=f"cat > {tmp_path}/told; echo 'docker-default (enforce)' > {profiles}",
    )
    engine = memory_engine(tmp_path, Machine(tmp_path))
    async with engine.running():
        await engine.add(new_container("first"))
        reported.unlink()
        await engine.add(new_container("second"))
        assert not reported.exists()
        profiles.write_text("")
        await engine.add(new_container("third"))
        assert reported.exists()


def test_a_container_and_its_execs_get_the_profile() -> None:
    assert built(CONFINING).specification["process"]["apparmorProfile"] == "docker-default"
    assert built(CONFINING, apparmor="mine").specification["process"]["apparmorProfile"] == "mine"
    assert "apparmorProfile" not in built().specification["process"]
    with pytest.raises(FailedPrecondition, match="AppArmor is not enabled on this machine: no profile mine"):
        built(apparmor="mine")
    requested = ExecConfig(command=("true",))
    process = exec_process(a_container(), requested, ProcessUser(), CONFINING)
    assert process["apparmorProfile"] == "docker-default"


def test_a_service_may_do_without_it() -> None:
    assert _security_options(Privileges(app_armor=AppArmorOpts(mode="default"))) == ()
    off = _security_options(Privileges(app_armor=AppArmorOpts(mode="disabled")))
    assert off == ("apparmor=unconfined",)


def test_each_processors_heat_is_masked_where_it_is_shown(tmp_path: Path) -> None:
    (tmp_path / "possible").write_text("0-2,9\n")
    for number in (0, 2, 5, 9):
        (tmp_path / f"cpu{number}/thermal_throttle").mkdir(parents=True)
    found = thermal_throttles(tmp_path)
    assert found == tuple(f"{tmp_path}/cpu{number}/thermal_throttle" for number in (0, 2, 9))
    own = capacity_of(Cgroups("none"), Programs(), cpus=tmp_path)
    linux = built(replace(ALL_CAPACITY, masked_paths=own.masked_paths)).specification["linux"]
    names = ("bus", "fs", "irq", "sys", "sysrq-trigger")
    assert list(linux["readonlyPaths"]) == [f"/proc/{name}" for name in names], "as in moby"
    assert linux["maskedPaths"] == [
        *(
            "/proc/acpi",
            "/proc/asound",
            "/proc/interrupts",
            "/proc/kcore",
            "/proc/keys",
            "/proc/latency_stats",
        ),
        *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats"),
        *("/sys/devices/virtual/powercap", "/sys/firmware", *found),
    ]
    assert thermal_throttles(tmp_path / "none") == ()
