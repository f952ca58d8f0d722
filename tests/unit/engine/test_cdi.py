"""Devices that vendors describe (CDI)."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from skep.engine.confinement.cdi import (
    Described,
    DeviceFile,
    Edits,
    Hook,
    described,
    edits_for,
    names_of,
    oci_hooks,
    units,
)
from skep.engine.confinement.machine import DeviceRequest
from skep.errors import FailedPrecondition, InvalidArgument

KNOWN = ("acme.com/gpu=0", "acme.com/gpu=1", "acme.com/gpu=all", "acme.com/net=eth9")


def a_file(directory: Path, name: str = "a.json", kind: str = "acme.com/gpu", **device: Any) -> None:
    directory.mkdir(exist_ok=True)
    content = {
        "cdiVersion": "0.5.0",
        "kind": kind,
        "devices": [{"name": "0", "containerEdits": device}],
        "containerEdits": {"env": ["COMMON=1"]},
    }
    (directory / name).write_bytes(msgspec.json.encode(content))


def request(count: int = 0, *ids: str, driver: str = "", capability: str = "gpu") -> DeviceRequest:
    return DeviceRequest(driver=driver, count=count, device_ids=ids, capabilities=((capability,),))


def test_gpus_are_chosen_by_number_or_count() -> None:
    assert names_of(request(-1), KNOWN) == ["acme.com/gpu=all"]
    assert names_of(request(1), KNOWN) == ["acme.com/gpu=0"]
    assert names_of(request(0, "1"), KNOWN) == ["acme.com/gpu=1"]
    assert names_of(DeviceRequest(driver="cdi", device_ids=("acme.com/net=eth9",)), KNOWN) == (
        "acme.com/net=eth9",
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(3), "3 devices acme.com/gpu were requested, but this machine has 2"),
        (request(-1, driver="nvidia"), 'could not select device driver "nvidia" with capabilities: [[gpu]]'),
        (request(-1, capability="tpu"), 'could not select device driver "" with capabilities: [[tpu]]'),
    ],
)
def test_gpus_that_are_not_there_are_refused(asked: DeviceRequest, words: str) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        names_of(asked, KNOWN)
    assert str(refused.value) == words


def test_a_count_beside_names_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="cannot set both Count and DeviceIDs"):
        names_of(request(1, "0"), KNOWN)


def test_the_later_directory_prevails_and_common_edits_are_made_once(tmp_path: Path) -> None:
    a_file(tmp_path / "etc", env=["FROM=etc"])
    a_file(tmp_path / "run", env=["FROM=run"])
    edits = edits_for([request(0, "0"), request(1)], (tmp_path / "etc", tmp_path / "run"))
    assert edits.env == ("COMMON=1", "FROM=run")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"kind": 1}', b"\xff", b'{"kind":"a/b","devices":7}'])
def test_a_file_that_cannot_be_read_hides_no_other(tmp_path: Path, content: bytes) -> None:
    a_file(tmp_path, "b.json")
    (tmp_path / "a.json").write_bytes(content)
    assert list(described((tmp_path, tmp_path / "nosuch"))) == ["acme.com/gpu=0"]


YAML = """\
# As a vendor's tool writes it.
cdiVersion: 0.5.0
kind: acme.com/gpu
devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - path: /dev/acme0
      major: 195
      fileMode: 438
    mounts:
    - {hostPath: /usr/lib/libacme.so, containerPath: /usr/lib/libacme.so, options: [ro, nosuid]}
containerEdits:
  env: [COMMON=1]
"""


@pytest.mark.parametrize("name", ["a.yaml", "a.yml"])
def test_descriptions_may_be_yaml(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(YAML)
    edits = edits_for([request(-1)], (tmp_path,))
    assert edits.env == ("COMMON=1",)
    assert [(one.path, one.major, one.file_mode) for one in edits.nodes] == [("/dev/acme0", 195, 0o666)]
    assert [(one.host_path, one.options) for one in edits.mounts] == [
        ("/usr/lib/libacme.so", ("ro", "nosuid"))
    ]
    (tmp_path / name).write_text(YAML.replace('"0"', '"1"'))
    assert list(described((tmp_path,))) == ["acme.com/gpu=1"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("kind: [", "did not find expected node content"),
        ("kind: &a x\ndevices: [*a]\n", "aliases are not supported"),
        ("[" * 100, "it is nested too deeply"),
        ("!!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    ],
)
def test_yaml_that_cannot_be_read_is_reported_and_hides_no_other(
    tmp_path: Path, content: str, words: str
) -> None:
    a_file(tmp_path, "b.json")
    (tmp_path / "a.yaml").write_text(content)
    with capture_logs() as logs:
        assert list(described((tmp_path,))) == ["acme.com/gpu=0"]
    assert words in logs[0]["error"]


def test_a_file_with_an_unknown_hook_is_not_used(tmp_path: Path) -> None:
    a_file(tmp_path, hooks=[{"hookName": "sometime", "path": "/bin/true"}])
    assert described((tmp_path,)) == {}


def test_hooks_are_the_runtimes() -> None:
    hook = Hook(hook_name="createContainer", path="/bin/true", args=("true",), timeout=3)
    assert oci_hooks([hook]) == {
        "createContainer": [{"path": "/bin/true", "args": ["true"], "env": [], "timeout": 3}]
    }


def test_a_description_that_stays_unreadable_is_logged_once(tmp_path: Path) -> None:
    a_file(tmp_path)
    (tmp_path / "nvidia.yaml").write_text("cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n")
    with capture_logs() as logged:
        assert [list(described([tmp_path])) for _ in range(3)] == [["acme.com/gpu=0"]] * 3
    assert [one["path"] for one in logged] == [str(tmp_path / "nvidia.yaml")]


def named(**devices: tuple[str, ...]) -> dict[str, Described]:
    """Devices of one kind by their device files."""
    return {
        f"acme.com/gpu={name}": Described(
            edits=Edits(nodes=tuple(DeviceFile(path=path) for path in paths)),
            file=Path("/etc/cdi/acme.json"),
            shared=Edits(),
        )
        for name, paths in devices.items()
    }


@pytest.mark.parametrize(
    ("devices", "counted"),
    [
        ({"g0": ("/dev/g0",), "g1": ("/dev/g1",), "all": ("/dev/g0", "/dev/g1")}, ["g0", "g1"]),
        ({"g0": ("/dev/g0",), "GPU_ab": ("/dev/g0",), "g1": ("/dev/g1",)}, ["GPU_ab", "g1"]),
        ({"g0": ("/dev/g0",), "g1": ("/dev/g1",), "both": ("/dev/g0", "/dev/g1")}, ["g0", "g1"]),
        ({"a": ("/dev/g0", "/dev/cap1"), "b": ("/dev/g0", "/dev/cap2")}, ["a", "b"]),
        ({"all": ("/dev/g0",)}, []),
    ],
)
def test_each_device_is_counted_once_whatever_its_names(
    devices: dict[str, tuple[str, ...]], counted: list[str]
) -> None:
    assert units(named(**devices)) == tuple(f"acme.com/gpu={name}" for name in counted)


def test_devices_without_device_files_are_compared_by_their_edits() -> None:
    found = {
        f"acme.com/license={name}": Described(edits=Edits(env=env), file=Path("/a"), shared=Edits())
        for name, env in (("a", ("KEY=1",)), ("b", ("KEY=2",)), ("c", ("KEY=1",)))
    }
    assert units(found) == ("acme.com/license=a", "acme.com/license=b")
