"""What a container may do, see and use, checked from inside."""

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.engine.containers.container import Container, MountPoint, PlainOptions
from skep.engine.engine import Engine
from skep.errors import InvalidArgument
from skep.model.container import Ulimit
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.runc_lab import Lab

DOCKERS_CAPABILITIES = 0xA80425FB
"""CapBnd of a container that a Docker Engine starts without options."""


def fields(status: str) -> dict[str, str]:
    """Lines of /proc/self/status by name."""
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in status.splitlines())}


async def test_capabilities_are_dockers_and_a_filter_is_on(run: Runner) -> None:
    status = fields(await run.output("cat", "/proc/self/status"))
    for name in ("CapBnd", "CapEff", "CapPrm"):
        assert int(status[name], 16) == DOCKERS_CAPABILITIES
    assert int(status["CapInh"], 16) == 0
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "0")


async def test_the_seccomp_profile_follows_the_capabilities(run: Runner) -> None:
    """syslog(2) is for CAP_SYSLOG only, by the profile: the kernel lets every user read by default."""
    command = ("busybox", "dmesg")
    assert "not permitted" in await run.output(*command)
    assert "not permitted" not in await run.output(*command, capability_add=("SYSLOG",))
    status = fields(await run.output("cat", "/proc/self/status", seccomp="unconfined"))
    assert status["Seccomp"] == "0"


async def test_capabilities_can_be_added_and_dropped(run: Runner) -> None:
    status = fields(
        await run.output(
            "cat", "/proc/self/status", capability_add=("NET_ADMIN",), capability_drop=("CAP_CHOWN",)
        )
    )
    assert int(status["CapEff"], 16) == (DOCKERS_CAPABILITIES | 1 << 12) & ~1
    status = fields(await run.output("cat", "/proc/self/status", capability_drop=("ALL",)))
    assert int(status["CapEff"], 16) == 0
    with pytest.raises(InvalidArgument, match="invalid capability"):
        await run.create("true", capability_add=("NONSENSE",))


async def test_a_user_has_no_capabilities_and_his_groups(run: Runner) -> None:
    output = await run.output(
        "sh", "-c", "id; grep CapEff /proc/self/status", user="alice", groups=("video",)
    )
    assert (
        output
        == "uid=1000(alice) gid=1001(alice) groups=44(video),50(staff),1001(alice)\nCapEff:\t0000000000000000\n"
    )
    assert (await run.output("id", user="12:34")) == "uid=12 gid=34 groups=34\n"
    with pytest.raises(InvalidArgument, match="unable to find user bob: no matching entries in passwd file"):
        await run.create("id", user="bob")


async def test_a_user_without_capabilities_listens_at_any_port_and_may_ping(run: Runner) -> None:
    """``ping`` of a distribution's busybox opens only raw sockets, so perl opens the socket for pings."""
    listens = "httpd -p 80 -h /tmp 2>/dev/null && echo listens || echo refused"
    pings = "perl -e 'socket(S, 2, 2, 1) or die $!; print qq(pings\\n)'"
    perl = MountPoint(type="bind", source=shutil.which("perl") or "", destination="/bin/perl", read_only=True)
    libraries = await asyncio.to_thread(subprocess.check_output, ["ldd", perl.source], text=True)
    paths = [word for word in libraries.split() if word.startswith("/")]
    mounts = (perl, *(MountPoint(type="bind", source=one, destination=one, read_only=True) for one in paths))
    user = {"user": "1000", "capability_drop": ("ALL",)}
    assert await run.output("sh", "-c", listens, **user) == "listens\n"
    limited = {"net.ipv4.ip_unprivileged_port_start": "1024"}
    assert await run.output("sh", "-c", listens, sysctls=limited, **user) == "refused\n"
    assert await run.output("sh", "-c", pings, mounts=mounts, **user) == "pings\n"


async def test_limits_are_applied(lab: Lab, run: Runner, engine: Engine) -> None:
    container = await run.start(
        "sleep",
        "100",
        memory_bytes=32 << 20,
        memory_reservation_bytes=16 << 20,
        nano_cpus=250_000_000,
        pids=33,
    )
    # runc returns from the start a moment before the command takes its place and that of runc's threads.
    assert container.process is not None
    comm = Path(f"/proc/{container.process.pid}/comm")
    await eventually(lambda: comm.read_text() == "sleep\n", "the command is there")
    stats = await engine.stats(container.id)
    assert stats.memory_stats.limit == 32 << 20
    assert stats.pids_stats.limit == 33
    assert stats.pids_stats.current == 1
    assert stats.cpu_stats.throttling_data.periods >= 0

    def limited(before: Container) -> Container:
        config = replace(before.config, nano_cpus=0, memory_bytes=64 << 20, pids=0)
        return replace(before, config=config)

    changed = await engine.update(container.id, limited)
    assert changed.config.memory_bytes == 64 << 20
    stats = await engine.stats(container.id)
    assert (stats.memory_stats.limit, stats.pids_stats.limit) == (64 << 20, 0)
    assert stats.networks["eth0"].rx_errors == 0


async def test_no_more_processes_than_the_limit(run: Runner) -> None:
    output = await run.output("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done", pids=4)
    assert "can't fork" in output


async def test_a_terminal_has_its_size_from_its_start_on(run: Runner) -> None:
    plain = PlainOptions(console_size=(31, 87))
    assert await run.output("stty", "size", tty=True, plain=plain) == "31 87\r\n"


async def test_ulimits_sysctls_and_the_oom_score(run: Runner) -> None:
    output = await run.output(
        "sh",
        "-c",
        "ulimit -n; cat /proc/sys/net/core/somaxconn /proc/self/oom_score_adj",
        ulimits=(Ulimit(name="nofile", soft=1234, hard=2345),),
        sysctls={"net.core.somaxconn": "321"},
        oom_score_adj=500,
    )
    assert output.split() == ["1234", "321", "500"]
    with pytest.raises(InvalidArgument, match="invalid ulimit type: nonsense"):
        await run.create("true", ulimits=(Ulimit(name="nonsense", soft=1, hard=1),))


async def test_names_environment_and_directory(run: Runner) -> None:
    output = await run.output(
        "sh",
        "-c",
        "hostname; cat /etc/hostname; pwd; echo $A $HOSTNAME $HOME; cat /etc/resolv.conf; grep extra /etc/hosts",
        hostname="web-1",
        env=("A=b c", "HOME=/tmp"),
        working_dir="/new/directory",
        nameservers=("192.0.2.53",),
        search_domains=("example.org",),
        dns_options=("ndots:2",),
        hosts=("198.51.100.7 extra more",),
    )
    assert output.splitlines() == [
        *("web-1", "web-1", "/new/directory", "b c web-1 /tmp"),
        *("search example.org", "nameserver 192.0.2.53", "options ndots:2", "198.51.100.7\textra more"),
    ]


async def test_the_host_name_is_the_short_id_by_default(run: Runner, engine: Engine) -> None:
    container = await run.start("hostname")
    await engine.wait(container.id)
    assert await run.logs(container) == f"{container.id[:12]}\n"


async def test_an_init_is_the_first_process_when_wanted(run: Runner) -> None:
    assert "docker-init" in await run.output("cat", "/proc/1/cmdline", init=True)
    assert "docker-init" not in await run.output("cat", "/proc/1/cmdline")


async def test_a_read_only_container_cannot_write_but_to_its_mounts(run: Runner) -> None:
    mounts = (MountPoint(type="tmpfs", destination="/scratch", options=("mode=1777", "size=65536")),)
    output = await run.output(
        "sh", "-c", "touch /x && echo root; touch /scratch/x && echo scratch", read_only=True, mounts=mounts
    )
    assert "scratch" in output
    assert "Read-only file system" in output
    assert "root" not in output


def a_tmpfs(destination: str, *options: str, read_only: bool = False) -> MountPoint:
    return MountPoint(
        type="tmpfs",
        destination=destination,
        options=("noexec", "nosuid", "nodev", "rprivate", *options),
        read_only=read_only,
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("mode=1770", "size=65536", "uid=1000", "gid=1001"), "1770 1000:1001 64k"),
        (("size=65536",), "{default} 0:0 64k"),
    ],
)
@pytest.mark.parametrize(("path", "default"), [("/new/deep", "1777"), ("/srv/owned", "750")])
async def test_a_tmpfs_has_its_mode_owner_and_size_at_every_start(
    run: Runner, engine: Engine, path: str, default: str, options: tuple[str, ...], expected: str
) -> None:
    """Without a mode it is 1777, or that of the image's directory, which it covers."""
    of_image = run.lab.tree / "srv/owned"
    of_image.mkdir(parents=True)
    of_image.chmod(0o750)
    (of_image / "file").write_text("of the image")
    command = f"stat -c '%a %u:%g' {path}; mount | grep ' {path} '; ls -A {path}; echo x >{path}/left"
    container = await run.create("sh", "-c", command, mounts=(a_tmpfs(path, *options),))
    for start in (1, 2, 3):
        await engine.start(container.id)
        await engine.wait(container.id)
        lines = (await run.logs(container)).splitlines()[2 * (start - 1) :]
        mode, owner, size = expected.format(default=default).split()
        assert lines[0] == f"{mode} {owner}"
        assert lines[1].startswith(f"tmpfs on {path} type tmpfs")
        assert {"noexec", "nosuid", "nodev", f"size={size}"} <= set(
            lines[1].partition("(")[2][:-1].split(",")
        )
        assert len(lines) == 2, "nothing of the image, or of an earlier start"
    await eventually(lambda: container.id not in Path("/proc/self/mountinfo").read_text(), "unmounted")


async def test_programs_run_from_a_tmpfs_that_allows_it_and_one_is_read_only(run: Runner) -> None:
    programs = "for path in /no /yes; do busybox cp /bin/busybox $path/true && $path/true && echo $path; done"
    command = f"{programs}; touch /fixed/x"
    executable = MountPoint(type="tmpfs", destination="/yes", options=("nosuid", "nodev", "exec"))
    mounts = (a_tmpfs("/no"), executable, a_tmpfs("/fixed", read_only=True))
    output = await run.output("sh", "-c", command, mounts=mounts)
    assert "/yes" in output.splitlines()
    assert "/no" not in output.splitlines()
    assert "Read-only file system" in output


async def test_bind_mounts_reach_the_node(tmp_path: Path, run: Runner) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("from the node")
    mounts = (
        MountPoint(type="bind", source=str(shared), destination="/shared"),
        MountPoint(type="bind", source=str(shared), destination="/fixed", read_only=True),
    )
    command = "cat /shared/file; echo back >/shared/answer; touch /fixed/x || echo refused"
    output = await run.output("sh", "-c", command, mounts=mounts)
    assert "from the node" in output
    assert "refused" in output
    assert (shared / "answer").read_text() == "back\n"


async def test_proc_is_masked_and_the_cgroup_is_read_only(run: Runner) -> None:
    command = "cat /proc/timer_list | head -c 10; ls /sys/firmware; hostname >/proc/sys/kernel/hostname"
    cgroups = (
        "/sys/fs/cgroup/ $(ls -d /sys/fs/cgroup/*/ 2>&-)"  # v2: the container's; v1: and one per hierarchy
    )
    output = await run.output("sh", "-c", f"{command}; for d in {cgroups}; do mkdir $d/x; done")
    assert output.count("ead-only file system") == len(output.splitlines())  # nothing of the masked ones
    assert len(output.splitlines()) >= 2


async def test_an_image_cannot_lead_the_lookup_of_users_out_of_itself(lab: Lab, run: Runner) -> None:
    """A passwd that is a link to a file of the node is read inside the image, where there is none."""
    passwd = lab.tree / "etc/passwd"
    passwd.unlink()
    passwd.symlink_to("/proc/self/environ")
    with pytest.raises(InvalidArgument, match="unable to find user alice"):
        await run.create("true", user="alice")


async def test_changes_against_the_image_are_listed(run: Runner, engine: Engine) -> None:
    container = await run.start(
        "sh", "-c", "echo new >/tmp/new; echo x >>/etc/passwd; rm() { busybox rm $@; }; rm /etc/group"
    )
    await engine.wait(container.id)
    changed = {path: kind for kind, path in engine.changes(container.id)}
    assert (changed["/tmp/new"], changed["/etc/passwd"], changed["/etc/group"]) == (1, 0, 2)


async def test_many_starts_at_once_all_come_up(run: Runner, engine: Engine) -> None:
    started = await asyncio.gather(*(run.start("sleep", "100") for _ in range(12)))
    assert len({container.pid for container in started}) == 12
    assert len({container.sandbox.address for container in started if container.sandbox}) == 12
    await asyncio.gather(*(engine.remove(container.id, force=True) for container in started))


async def test_variables_of_a_start_are_in_no_record(run: Runner, engine: Engine) -> None:
    container = await run.create("sh", "-c", "echo ${#A}", env=("A=record",))
    await engine.start(container.id, secret_env=("A=hidden value",))
    await engine.wait(container.id)
    assert await run.logs(container) == "12\n"
    assert engine.get(container.id).config.env == ("A=record",)
    kept = engine.bundles.path(container.id).rglob("*")
    records = [path.read_bytes() for path in kept if path.is_file() and not path.is_symlink()]
    assert any(b"A=record" in content for content in records)
    assert not any(b"hidden value" in content for content in records)
    run_files = list(engine.bundles.bundle(container.id).glob("*.json"))
    assert run_files, "what runc has read"
    assert not any(b"hidden value" in path.read_bytes() for path in run_files)
