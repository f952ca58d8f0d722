"""SELinux labels: which a container gets, which are free, what is read of the machine, and how files are labeled."""

import os
import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.engine.api.responses.container_responses import inspected
from skep.engine.confinement import selinux
from skep.engine.confinement.selinux import NO_LABELS, Labels, Policy, labels_of, relabel
from skep.engine.confinement.users import ProcessUser
from skep.engine.containers.container import ContainerConfig, ExecConfig, MountPoint
from skep.engine.containers.request import CreateRequest, HostConfig
from skep.engine.containers.shared_namespaces import with_label_options
from skep.engine.engine import EngineConfig
from skep.engine.runtime.runtime_spec import exec_process
from skep.engine.volumes.mounts import relabel_modes, relabel_sources
from skep.errors import FailedPrecondition, InvalidArgument
from tests.support.engine.oci_rig import Machine, memory_engine, new_container
from tests.support.engine.stub_engine import a_container as existing
from tests.unit.engine.test_specification import ALL_CAPACITY, a_container, built

POLICY = Policy("system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0")
PROCESS, FILE = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"


class Chosen(random.Random):
    """Chooses the given pairs of categories, in this order."""

    def __init__(self, *pairs: tuple[int, int]) -> None:
        super().__init__()
        self._pairs = list(pairs)

    def sample(self, *_: object, **__: object) -> list[int]:  # type: ignore[override]
        return list(self._pairs.pop(0))


def test_a_container_gets_a_pair_of_categories_that_is_free() -> None:
    assert labels_of(POLICY, (), (), Chosen((2, 1))) == Labels(PROCESS, FILE)
    labels = labels_of(POLICY, (), (PROCESS, ""), Chosen((1, 2), (1022, 1023), (1, 3)))
    assert labels.process == "system_u:system_r:container_t:s0:c1,c3"
    assert labels.mount == "system_u:object_r:container_file_t:s0:c1,c3"


@pytest.mark.parametrize(
    ("options", "process", "mount"),
    [
        (("disable",), "", "system_u:object_r:container_file_t:s0:c1022,c1023"),
        (("user:a", "disable"), "", "system_u:object_r:container_file_t:s0:c1022,c1023"),
        (("type:mine_t",), "system_u:system_r:mine_t:s0:c1,c2", FILE),
        (("filetype:mine_t",), PROCESS, "system_u:object_r:mine_t:s0:c1,c2"),
        (
            ("user:a", "role:b", "level:s0:c7,c9"),
            "a:b:container_t:s0:c7,c9",
            "a:object_r:container_file_t:s0:c7,c9",
        ),
        (
            ("level:TopSecret",),
            "system_u:system_r:container_t:TopSecret",
            "system_u:object_r:container_file_t:TopSecret",
        ),
    ],
)
def test_options_change_labels_as_in_docker(options: tuple[str, ...], process: str, mount: str) -> None:
    assert labels_of(POLICY, options, (), Chosen((1, 2))) == Labels(process, mount)


def test_an_option_that_docker_does_not_know_is_refused_in_its_words() -> None:
    words = (
        "bad label option \"nested\", valid options 'disable' or \n"
        "'user, role, level, type, filetype' followed by ':' and a value"
    )
    with pytest.raises(InvalidArgument) as refused:
        labels_of(POLICY, ("nested",), (), random.Random(1))
    assert str(refused.value) == words


def test_without_selinux_no_option_has_an_effect() -> None:
    assert labels_of(None, ("nested", "type:x"), (), random.Random(1)) == NO_LABELS


def test_a_policy_without_containers_is_named() -> None:
    with pytest.raises(
        FailedPrecondition, match="does not know the label system_u:system_r:container_t:s0: install"
    ):
        labels_of(POLICY._replace(is_known=False), (), (), random.Random(1))


def test_a_policy_without_levels_has_no_categories() -> None:
    plain = Policy("system_u:system_r:container_t", "system_u:object_r:container_file_t")
    assert labels_of(plain, (), (), random.Random(1)) == Labels(plain.process, plain.file)


def machine(place: Path, current: str = "system_u:system_r:initrc_t:s0\0") -> dict[str, Path]:
    (place / "sys/fs/selinux").mkdir(parents=True)
    for name, text in (("policyvers", "33"), ("context", "")):
        (place / "sys/fs/selinux" / name).write_text(text)
    (place / "etc/selinux/default/contexts").mkdir(parents=True)
    (place / "etc/selinux/config").write_text("# a comment\nSELINUX=enforcing\nSELINUXTYPE=default\n")
    (place / "etc/selinux/default/contexts/lxc_contexts").write_text(
        f'process = "{POLICY.process}"\nfile = "{POLICY.file}"\nro_file = "x"\n'
    )
    (place / "current").write_text(current)
    return {
        "sysfs": place / "sys",
        "etc": place / "etc",
        "contexts": place / "none",
        "own": place / "current",
    }


def test_the_policys_file_names_the_labels(tmp_path: Path) -> None:
    found = machine(tmp_path)
    assert selinux.find_policy(**found) == POLICY
    (tmp_path / "none").write_text('process = "a:b:c:s0"\nfile = "d:e:f:s0"\n')
    assert selinux.find_policy(**found) == Policy("a:b:c:s0", "d:e:f:s0")
    (tmp_path / "sys/fs/selinux/context").unlink()
    (tmp_path / "sys/fs/selinux/context").mkdir()  # as the kernel refuses an unknown label
    assert selinux.find_policy(**found) == Policy("a:b:c:s0", "d:e:f:s0", is_known=False)


def test_a_kernel_without_a_loaded_policy_labels_nothing(tmp_path: Path) -> None:
    assert selinux.find_policy(**machine(tmp_path / "a", current="kernel\0")) is None
    assert selinux.find_policy(tmp_path / "none") is None


async def test_containers_keep_their_labels_and_no_two_have_the_same(tmp_path: Path) -> None:
    config = EngineConfig(starts_max=4, chance=Chosen((1, 2), (1, 2), (1, 2), (3, 4)))
    rig = memory_engine(tmp_path, Machine(), policy=POLICY, config=config)
    async with rig.running():
        first = await rig.add(new_container("first"))
        second = await rig.add(new_container("second"))
        assert (first.config.process_label, first.config.mount_label) == (PROCESS, FILE)
        assert second.config.process_label == "system_u:system_r:container_t:s0:c3,c4"
        assert (shown := inspected(first, rig.bundles, (), {}))["ProcessLabel"] == PROCESS
        assert shown["MountLabel"] == FILE
        read = rig.bundles.read(first.id)
        assert read is not None
        assert read.config.process_label == PROCESS, "the next process finds it in use"


def test_labels_are_in_the_runtimes_input() -> None:
    specification = built(process_label=PROCESS, mount_label=FILE).specification
    assert specification["process"]["selinuxLabel"] == PROCESS
    assert specification["linux"]["mountLabel"] == FILE
    bare = built().specification
    assert "selinuxLabel" not in bare["process"]
    assert "mountLabel" not in bare["linux"]


def test_an_exec_has_the_containers_label() -> None:
    container = a_container(process_label=PROCESS)
    process = exec_process(container, ExecConfig(command=("true",)), ProcessUser(), ALL_CAPACITY)
    assert process["selinuxLabel"] == PROCESS


@pytest.mark.parametrize(
    ("host", "options"),
    [
        (HostConfig(), ()),
        (HostConfig(privileged=True), ("label=disable",)),
        (HostConfig(pid_mode="host"), ("label=disable",)),
        (HostConfig(ipc_mode="host", security_opt=("label=type:x_t",)), ("label=type:x_t",)),
        (
            HostConfig(pid_mode="container:a"),
            (
                "label=user:system_u",
                "label=role:system_r",
                "label=type:container_t",
                "label=level:s0:c1,c2",
            ),
        ),
        (HostConfig(pid_mode="container:a", ipc_mode="container:free"), ()),
        (HostConfig(ipc_mode="container:free"), ()),
    ],
)
def test_shared_namespaces_share_the_label_or_end_the_confinement(
    host: HostConfig, options: tuple[str, ...]
) -> None:
    labels = {"a": PROCESS, "b": f"{PROCESS}4", "free": ""}

    def get(name: str) -> object:
        return existing(config=ContainerConfig(path="x", process_label=labels[name]))

    request = with_label_options(CreateRequest(host_config=host), get)  # type: ignore[arg-type]
    assert request.host_config.security_opt == options
    both = CreateRequest(host_config=HostConfig(pid_mode="container:a", ipc_mode="container:b"))
    with pytest.raises(InvalidArgument, match=r"^--ipc and --pid containers SELinux labels aren't the same$"):
        with_label_options(both, get)  # type: ignore[arg-type]


def test_volumes_are_shared_unless_their_mount_says_otherwise() -> None:
    points = [
        MountPoint(type="volume", destination="/a", driver="local"),
        MountPoint(type="volume", destination="/b", driver="local"),
        MountPoint(type="volume", destination="/of-a-plugin", driver="other"),
        MountPoint(type="bind", destination="/c"),
        MountPoint(type="bind", destination="/d"),
    ]
    modes = relabel_modes(("b:/b:Z", "/c:/c:ro,z", "/d:/d"), points, {"/e": "Z"})
    assert modes == {"/a": "z", "/b": "Z", "/c": "z", "/e": "Z"}


@pytest.fixture
def labeled(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The labels that would be set, by path."""
    found: dict[str, str] = {}
    monkeypatch.setattr(
        selinux,
        "_set",
        lambda descriptor, label: found.update({os.readlink(f"/proc/self/fd/{descriptor}"): label}),
    )
    return found


def test_everything_below_a_source_is_labeled_and_links_are_not_followed(
    tmp_path: Path, labeled: dict[str, str]
) -> None:
    outside, source = tmp_path / "outside", tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").touch()
    (source / "deep/file").touch()
    (source / "link").symlink_to(outside)
    (tmp_path / "given").symlink_to(source)
    relabel(str(tmp_path / "given"), FILE, selinux.PRIVATE)
    inside = {str(source / name) for name in ("deep", "deep/er", "deep/file", "link")}
    assert labeled == dict.fromkeys({str(source), *inside}, FILE)
    assert list(labeled)[-1] == str(source), "so that an interrupted run is repeated"
    labeled.clear()
    relabel(str(source / "deep/file"), FILE, selinux.SHARED)
    assert labeled == {str(source / "deep/file"): "system_u:object_r:container_file_t:s0"}
    labeled.clear()
    relabel(str(source), "", selinux.SHARED)
    assert not labeled


def test_paths_that_the_machine_needs_are_refused_in_dockers_words(
    labeled: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("/", "/etc/", "/usr", "/home", str(tmp_path)):
        real = os.path.realpath(path)
        words = f"error setting label on mount source '{real}': SELinux relabeling of {real} is not allowed"
        with pytest.raises(FailedPrecondition) as refused:
            relabel(path, FILE, selinux.SHARED)
        assert str(refused.value) == words
    assert not labeled


def test_the_kernels_label_is_the_extended_attribute(tmp_path: Path) -> None:
    """Any kernel keeps it as text if its file system has such attributes."""
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "file").touch()
    relabel(str(tmp_path), FILE, selinux.PRIVATE)
    for path in (tmp_path, tmp_path / "file", tmp_path / "link"):
        assert os.getxattr(path, "security.selinux", follow_symlinks=False) == FILE.encode()
    with pytest.raises(OSError, match="No data"):
        os.getxattr("/etc/passwd", "security.selinux")


async def test_sources_are_labeled_when_a_container_starts(tmp_path: Path, labeled: dict[str, str]) -> None:
    rig = memory_engine(tmp_path, Machine(), policy=POLICY)
    (tmp_path / "source").mkdir()
    mount = MountPoint(type="bind", destination="/x", source=str(tmp_path / "source"))
    config = ContainerConfig(path="true", mounts=(mount,), relabel={"/x": "Z"})
    async with rig.running():
        container = await rig.add(replace(new_container("first"), config=config))
        assert mount.source not in labeled, "volumes are not mounted yet"
        await rig.start(container.id)
        assert labeled[mount.source] == container.config.mount_label
        for name in ("hosts", "hostname", "resolv.conf"):
            assert labeled[str(rig.bundles.path(container.id) / name)] == container.config.mount_label


def test_an_init_is_copied_once_for_all_containers(tmp_path: Path, labeled: dict[str, str]) -> None:
    (tmp_path / "init").write_text("a program")
    (tmp_path / "init").chmod(0o755)
    (tmp_path / "run").mkdir()
    for _ in range(2):
        copy = selinux.shared_program(str(tmp_path / "init"), tmp_path / "run", FILE)
    assert copy == str(tmp_path / "run/init")
    assert os.access(copy, os.X_OK)
    assert os.listdir(tmp_path / "run") == ["init"]
    assert list(labeled.values()) == ["system_u:object_r:container_file_t:s0"], (
        "labeled before it has its name"
    )


def test_secrets_belong_to_their_container_alone(tmp_path: Path, labeled: dict[str, str]) -> None:
    paths = {name: str(tmp_path / name) for name in ("secret", "volume", "bind")}
    for path in paths.values():
        Path(path).touch()
    mounts = (
        MountPoint(type="bind", destination="/run/secrets/a", source=paths["secret"], internal=True),
        MountPoint(type="volume", destination="/v", source=paths["volume"]),
        MountPoint(type="bind", destination="/b", source=paths["bind"]),
        MountPoint(type="tmpfs", destination="/t"),
    )
    config = ContainerConfig(path="x", mounts=mounts, relabel={"/v": "z"})
    relabel_sources(config, mounts)
    assert not labeled
    relabel_sources(replace(config, mount_label=FILE), mounts)
    assert labeled == {paths["secret"]: FILE, paths["volume"]: "system_u:object_r:container_file_t:s0"}
