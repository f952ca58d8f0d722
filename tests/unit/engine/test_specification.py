"""The runtime specification of a container, and its parts."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.capacity import Capacity
from skep.engine.confinement import capabilities, seccomp
from skep.engine.confinement.users import ProcessUser, resolve
from skep.engine.containers.container import Container, ContainerConfig, ExecConfig, MountPoint
from skep.engine.runtime.runtime_spec import Built, build, exec_process, merged_environment
from skep.errors import InvalidArgument
from skep.model.container import Ulimit
from skep.model.values.ids import ContainerId

ALL_CAPACITY = Capacity(
    capabilities=frozenset(capabilities.ALL),
    controllers=frozenset(("memory", "cpu", "pids")),
    has_swap_accounting=True,
    init_binary="/usr/bin/tini-static",
)
PASSWD = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001::/home/alice:/bin/sh\nbroken\n1234:x:7:8::/:\n"
GROUP = "root:x:0:\nstaff:x:50:alice,bob\nvideo:x:44:\n"


def a_container(**config: object) -> Container:
    defaults: dict[str, object] = {"path": "true", "hostname": "h", "seccomp": "unconfined"}
    return Container(
        id=ContainerId("c" * 64),
        name="c",
        image="i",
        image_id="sha256:i",
        config=ContainerConfig(**{**defaults, **config}),  # type: ignore[arg-type]
    )


def built(capacity: Capacity = ALL_CAPACITY, **config: object) -> Built:
    return build(a_container(**config), ProcessUser(), capacity, rootfs="/r", cgroup="/skep/ctr/c", files=())


# --- capabilities ------------------------------------------------------------------------------------------------


def test_dockers_capabilities_are_the_default() -> None:
    assert set(capabilities.granted((), ())) == set(capabilities.DEFAULT)
    assert len(capabilities.DEFAULT) == 14


def test_capabilities_are_added_and_dropped_with_or_without_prefix_and_in_any_case() -> None:
    granted = capabilities.granted(("net_admin", "CAP_SYS_TIME"), ("chown",))
    assert {"CAP_NET_ADMIN", "CAP_SYS_TIME"} < set(granted)
    assert "CAP_CHOWN" not in granted
    assert capabilities.granted(("ALL",), ("CAP_CHOWN",)) == tuple(
        n for n in capabilities.ALL if n != "CAP_CHOWN"
    )
    assert capabilities.granted(("NET_RAW",), ("ALL",)) == ("CAP_NET_RAW",)


def test_the_bounding_set_is_read_from_the_kernel() -> None:
    assert capabilities.bounding_set("Name:\tx\nCapBnd:\t0000000000000021\n") == {"CAP_CHOWN", "CAP_KILL"}


# --- seccomp -----------------------------------------------------------------------------------------------------

PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": None},
    ],
    "syscalls": [
        {
            "names": ["read"],
            "action": "SCMP_ACT_ALLOW",
            "args": [],
            "comment": "",
            "includes": {},
            "excludes": {},
        },
        {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {
            "names": ["bpf"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 1,
            "excludes": {"caps": ["CAP_SYS_ADMIN"]},
        },
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64", "x32"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ", "extra": 1}],
        },
    ],
}


def rules(*caps: str, machine: str = "x86_64", kernel: tuple[int, int] = (6, 1)) -> list[tuple[str, str]]:
    converted = seccomp.for_runtime(PROFILE, frozenset(caps), machine=machine, kernel=kernel)
    return [(rule["names"][0], rule["action"].removeprefix("SCMP_ACT_")) for rule in converted["syscalls"]]


def test_a_profile_is_evaluated_for_capabilities_architecture_and_kernel() -> None:
    usual = [("arch_prctl", "ALLOW"), ("ptrace", "ALLOW"), ("personality", "ALLOW")]
    assert rules() == [("read", "ALLOW"), ("bpf", "ERRNO"), *usual]
    assert rules("CAP_SYS_ADMIN") == [("read", "ALLOW"), ("bpf", "ALLOW"), *usual]
    assert ("arch_prctl", "ALLOW") not in rules(machine="aarch64")
    assert ("ptrace", "ALLOW") not in rules(kernel=(4, 7))


@pytest.mark.parametrize(
    "release", ["6.16+deb14-amd64", "6.16.3+deb14-amd64", "6.16", "6.16-rc1", "6.16.0-40-generic", "6.16+"]
)
def test_a_kernel_is_as_new_as_its_release_begins(release: str) -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": [version], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": version}}
            for version in ("6.15", "6.16", "6.17")
        ],
    }
    converted = msgspec.json.decode(seccomp.custom(msgspec.json.encode(profile), (), release=release))
    assert [rule["names"][0] for rule in converted["syscalls"]] == ["6.15", "6.16"]


def test_a_converted_profile_keeps_arguments_errors_and_architectures() -> None:
    converted = seccomp.for_runtime(PROFILE, frozenset(), machine="x86_64", kernel=(6, 1))
    assert converted["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    assert (converted["defaultAction"], converted["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    assert converted["syscalls"][-1]["args"] == [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]
    assert converted["syscalls"][1]["errnoRet"] == 1


def test_x32_is_left_out_where_the_kernel_has_none() -> None:
    profile = msgspec.json.encode(PROFILE)
    whole, narrow = (
        msgspec.json.decode(seccomp.custom(profile, (), has_x32=has_x32)) for has_x32 in (True, False)
    )
    if "SCMP_ARCH_X32" in whole["architectures"]:  # this machine is an x86_64
        assert narrow["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert narrow["syscalls"] == whole["syscalls"]


@given(st.binary(max_size=200))
def test_a_profile_that_is_none_is_an_invalid_argument(profile: bytes) -> None:
    with pytest.raises(InvalidArgument, match="Decoding seccomp profile failed"):
        seccomp.custom(profile, ())


# --- users -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", ProcessUser(0, 0, (), "/root")),
        ("alice", ProcessUser(1000, 1001, (50,), "/home/alice")),
        ("1000", ProcessUser(1000, 1001, (50,), "/home/alice")),
        ("alice:video", ProcessUser(1000, 44, (), "/home/alice")),
        ("alice:", ProcessUser(1000, 1001, (50,), "/home/alice")),
        ("4321", ProcessUser(4321, 0, (), "/")),
        ("4321:99", ProcessUser(4321, 99, (), "/")),
        ("1234", ProcessUser(1234, 0, (), "/")),  # a number is no name
        ("0000", ProcessUser(0, 0, (), "/root")),
        ("alice:1234", ProcessUser(1000, 1234, (), "/home/alice")),
    ],
)
def test_users_are_looked_up_as_docker_does(user: str, expected: ProcessUser) -> None:
    assert resolve(user, (), PASSWD, GROUP) == expected


@pytest.mark.parametrize("user", ["bob", "alice:nosuch", "99999999999", "0:99999999999"])
def test_an_unknown_user_or_group_is_an_invalid_argument(user: str) -> None:
    with pytest.raises(InvalidArgument):
        resolve(user, (), PASSWD, GROUP)


@pytest.mark.parametrize("number", ["99999999999", "9" * 5000, "-1", "0x10", ""])
def test_an_entry_with_an_absurd_number_is_passed_over(number: str) -> None:
    passwd, group = f"x:x:{number}:0::/:\n{PASSWD}", f"g:x:{number}:root,alice\n{GROUP}"
    assert resolve("alice", (), passwd, group) == resolve("alice", (), PASSWD, GROUP)
    assert resolve("1000", (), passwd, group) == resolve("1000", (), PASSWD, GROUP)
    assert resolve("", ("video",), passwd, group).groups == (44,)


@pytest.mark.parametrize("number", ["99999999999", "9" * 5000])
def test_a_user_whose_own_number_is_absurd_is_refused_and_not_root(number: str) -> None:
    for entry in (f"x:x:{number}:0::/:", f"x:x:1:{number}::/:"):
        with pytest.raises(InvalidArgument, match="must be in range"):
            resolve("x", (), entry, GROUP)
    with pytest.raises(InvalidArgument, match="must be in range"):
        resolve("alice:x", (), PASSWD, f"x:x:{number}:")


def test_further_groups_are_added() -> None:
    assert resolve("alice", ("video", "77"), PASSWD, GROUP).groups == (50, 44, 77)


@given(st.text(max_size=40), st.text(max_size=200), st.text(max_size=200))
def test_no_passwd_file_of_an_image_can_crash_the_lookup(user: str, passwd: str, group: str) -> None:
    try:
        resolve(user, (), passwd, group)
    except InvalidArgument:
        return


# --- the whole ---------------------------------------------------------------------------------------------------


def test_limits_become_resources() -> None:
    resources = built(memory_bytes=64 << 20, nano_cpus=1_500_000_000, pids=9).specification["linux"][
        "resources"
    ]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 128 << 20}
    assert resources["cpu"] == {"quota": 150_000, "period": 100_000}
    assert resources["pids"] == {"limit": 9}


def test_what_the_node_cannot_give_becomes_a_warning_and_not_an_error() -> None:
    poor = Capacity(
        capabilities=frozenset(("CAP_CHOWN",)),
        hard_limits={"RLIMIT_NOFILE": 1000},
        controllers=frozenset(),
        has_swap_accounting=False,
        may_lower_oom_score=False,
    )
    result = built(
        poor,
        memory_bytes=1 << 20,
        nano_cpus=1,
        pids=1,
        init=True,
        oom_score_adj=-5,
        ulimits=(Ulimit(name="nofile", soft=500, hard=2000),),
    )
    process = result.specification["process"]
    assert process["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 500, "hard": 1000}]
    assert process["capabilities"]["bounding"] == ["CAP_CHOWN"]
    assert process["args"] == ["true"]
    assert "oomScoreAdj" not in process
    assert set(result.specification["linux"]["resources"]) == {"devices"}
    assert len(result.warnings) == 7


def test_an_unlimited_ulimit_is_the_kernels_largest_number() -> None:
    result = built(ulimits=(Ulimit(name="core", soft=-1, hard=-1),))
    assert result.specification["process"]["rlimits"][0]["hard"] == 2**64 - 1


@pytest.mark.parametrize(("soft", "hard"), [(9, 5), (-1, 5)])
def test_a_soft_ulimit_above_the_hard_one_is_refused(soft: int, hard: int) -> None:
    with pytest.raises(InvalidArgument, match=f"must be less than or equal to hard limit: {soft} > {hard}"):
        built(ulimits=(Ulimit(name="nofile", soft=soft, hard=hard),))


def test_the_environment_has_dockers_defaults_and_the_users_words() -> None:
    environment = built(env=("A=1", "PATH=/mine"), tty=True).specification["process"]["env"]
    assert environment == ["PATH=/mine", "HOSTNAME=h", "TERM=xterm", "A=1"]


@given(
    st.lists(st.from_regex(r"[A-C]=[0-9]", fullmatch=True)),
    st.lists(st.from_regex(r"[A-C](=[0-9])?", fullmatch=True)),
)
def test_later_values_win_and_bare_names_remove(base: list[str], over: list[str]) -> None:
    expected = dict(entry.split("=") for entry in base)
    for entry in over:
        if "=" in entry:
            expected[entry[0]] = entry[2:]
        else:
            expected.pop(entry[0], None)
    assert dict(entry.split("=") for entry in merged_environment(base, over)) == expected


def test_a_users_mount_replaces_the_default_one_at_its_target() -> None:
    own = MountPoint(type="bind", source="/own", destination="/dev/shm")
    mounts = built(mounts=(own,)).specification["mounts"]
    assert [mount["destination"] for mount in mounts].count("/dev/shm") == 1
    assert mounts[-1]["source"] == "/own"


def test_outer_mounts_come_before_inner_ones() -> None:
    inner = MountPoint(type="bind", source="/i", destination="/a/b/c")
    outer = MountPoint(type="bind", source="/o", destination="/a")
    mounts = built(mounts=(inner, outer)).specification["mounts"]
    assert [mount["destination"] for mount in mounts[-2:]] == ["/a", "/a/b/c"]


def test_a_shared_mount_makes_the_root_shared() -> None:
    shared = MountPoint(type="bind", source="/s", destination="/s", propagation="rshared")
    specification = built(mounts=(shared,)).specification
    assert specification["linux"]["rootfsPropagation"] == "shared"
    assert specification["mounts"][-1]["options"] == ["rbind", "rshared"]


def test_an_exec_inherits_the_containers_surroundings() -> None:
    container = a_container(env=("A=1",), working_dir="/w", capability_drop=("ALL",))
    process = exec_process(
        container, ExecConfig(command=("x",), env=("B=2",)), ProcessUser(5, 6), ALL_CAPACITY
    )
    assert (process["args"], process["cwd"]) == (["x"], "/w")
    assert process["env"][-2:] == ["A=1", "B=2"]
    assert process["capabilities"]["effective"] == []
    privileged = ExecConfig(command=("x",), privileged=True)
    assert (
        len(exec_process(container, privileged, ProcessUser(), ALL_CAPACITY)["capabilities"]["effective"])
        == 41
    )


def test_a_record_survives_being_written_and_read() -> None:
    container = a_container(ulimits=(Ulimit(name="core", soft=0, hard=0),), sysctls={"a": "b"})
    assert msgspec.json.decode(msgspec.json.encode(container), type=Container) == container
