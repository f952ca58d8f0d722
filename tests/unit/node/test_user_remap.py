"""The option ``userns-remap``: users, groups and subordinate ids, with Docker's messages and the next step."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.errors import FailedPrecondition, InvalidArgument, SkepError
from skep.model.values.user_map import IdRange, UserMap, mapping_of, next_id
from skep.node.host.user_remap import Accounts, free_range, load, read_accounts, resolve

ACCOUNTS = Accounts(
    users={"root": 0, "alice": 1000, "dockremap": 104, "bare": 1001},
    groups={"root": 0, "alice": 1000, "dockremap": 109, "staff": 50},
    subuid="alice:100000:65536\n# a comment\nbroken:1\ndockremap:165536:65536\n1000:400000:10\n",
    subgid="alice:200000:65536\ndockremap:165536:65536\n",
)


@pytest.mark.parametrize("option", ["default", "dockremap", "dockremap:staff", "104:109", "dockremap:109"])
def test_a_user_is_named_in_each_of_dockers_forms(option: str) -> None:
    users = resolve(option, ACCOUNTS)
    assert users is not None
    assert users.root == (165536, 165536)
    assert users.uid(33) == 165569


def test_several_ranges_follow_each_other_and_count_by_name_and_by_id() -> None:
    users = resolve("alice", ACCOUNTS)
    assert users is not None
    assert users.uids == (IdRange(0, 100000, 65536), IdRange(65536, 400000, 10))
    assert users.kernel_text == ("0 100000 65536\n65536 400000 10\n", "0 200000 65536\n")
    assert users.groups_count == 65536
    assert users.gids[0].oci == {"containerID": 0, "hostID": 200000, "size": 65536}


def test_root_maps_nothing_as_in_docker() -> None:
    assert resolve("root", ACCOUNTS) is None
    assert resolve("0:0", ACCOUNTS) is None


@pytest.mark.parametrize(
    ("option", "kind", "words"),
    [
        ("a:b:c", InvalidArgument, 'Invalid user/group specification in --userns-remap: "a:b:c"'),
        ("alice:", InvalidArgument, "Invalid user/group specification"),
        ("nobody1", InvalidArgument, 'Error during uid lookup for "nobody1"'),
        ("77", InvalidArgument, "Uid 77 has no entry in /etc/passwd"),
        ("alice:none", InvalidArgument, 'Error during gid lookup for "none"'),
        ("bare", InvalidArgument, 'Error during gid lookup for "bare"'),
        ("1000:77", InvalidArgument, "Gid 77 has no entry in /etc/group"),
        ("bare:staff", FailedPrecondition, "usermod --add-subuids 400010-465545 bare"),
    ],
)
def test_a_refusal_names_the_reason_and_the_next_step(option: str, kind: type[SkepError], words: str) -> None:
    with pytest.raises(kind) as error:
        resolve(option, ACCOUNTS)
    assert words in str(error.value)


def test_the_default_without_its_user_names_the_commands_that_create_it() -> None:
    with pytest.raises(FailedPrecondition) as error:
        resolve("default", Accounts(users={}, groups={}, subuid="bob:100000:65536\n", subgid=""))
    assert str(error.value) == (
        "userns-remap=default needs the user dockremap: "
        "useradd --system --user-group --no-create-home --shell /bin/false dockremap && "
        "usermod --add-subuids 165536-231071 --add-subgids 165536-231071 dockremap"
    )


def test_the_files_of_the_machine_are_read_and_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nodd\nbad:x:y:0::/:/bin/sh\n")
    (tmp_path / "subuid").write_text("root:1:2\n")
    assert read_accounts(tmp_path) == Accounts(users={"root": 0}, groups={}, subuid="root:1:2\n", subgid="")


def test_a_file_system_that_cannot_map_is_named(tmp_path: Path) -> None:
    run = Path("/proc/none")

    def problem(directory: Path) -> str:
        return "Invalid argument" if directory == tmp_path else ""

    assert load("", [tmp_path], run, lambda: ACCOUNTS, problem) is None
    assert load("root", [tmp_path], run, lambda: ACCOUNTS, problem) is None
    assert load("default", [], run, lambda: ACCOUNTS, problem) == resolve("default", ACCOUNTS)
    tried: list[Path] = []
    load(
        "default",
        [tmp_path, tmp_path / "new" / "one"],
        run,
        lambda: ACCOUNTS,
        lambda one: tried.append(one) or "",
    )
    assert tried == [tmp_path], "each file system is tried once"
    with pytest.raises(FailedPrecondition) as error:
        load("default", [tmp_path], run, lambda: ACCOUNTS, problem)
    assert f"{tmp_path} has none (Invalid argument): move it with --data-dir" in str(error.value)


def test_a_run_directory_that_the_mapped_root_cannot_pass_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(
        FailedPrecondition, match="restricts access to the remapped root uid/gid: chmod o\\+x"
    ):
        load("default", [], closed / "run", lambda: ACCOUNTS, lambda _: "")


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(1, 1 << 16)), max_size=6))
def test_each_id_of_the_container_has_one_id_of_the_machine(counts: list[tuple[int, int]]) -> None:
    start, ranges = 0, []
    for gap, size in counts:
        ranges.append((start + gap, size))
        start += gap + size
    found = mapping_of(reversed(ranges))
    assert sum(one.size for one in found) == next_id(found)
    users = UserMap(uids=found, gids=found)
    ids = [users.uid(one.inside) for one in found] + [users.uid(one.inside + one.size - 1) for one in found]
    assert ids == [first for first, _ in ranges] + [first + size - 1 for first, size in ranges]
    if found:
        assert users.uid(next_id(found)) == users.root[0]  # no such user: root


def test_the_next_free_range_follows_all_others() -> None:
    assert free_range("") == 100_000
    assert free_range("a:100000:65536\nb:500000:10\n") == 500_010
