"""Containers over the Engine API: what docker, its libraries and plain sockets see."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import PlainOptions
from skep.engine.images.platforms import this_platform
from skep.model.networks.sandbox import NetworkMode
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.api_lab import Api

# --- looking ----------------------------------------------------------------------------------------------------


async def test_a_running_container_is_listed_as_docker_lists_it(api: Api, run: Runner):
    container = await run.start(
        "sh", "-c", "sleep 100", name="web.1.abc", labels={"com.docker.swarm.task.id": "abc"}
    )
    _, [line] = await api.ask("GET", "/containers/json")
    assert line["Id"] == container.id
    assert line["Names"] == ["/web.1.abc"]
    assert line["Command"] == "sh -c 'sleep 100'"
    assert line["State"] == "running"
    assert line["Status"].startswith(("Up ", "Less"))
    assert line["Labels"] == {"com.docker.swarm.task.id": "abc"}


@pytest.mark.parametrize(
    ("filters", "is_found"),
    [
        ({"name": ["web"]}, True),
        ({"name": ["^/web.1"]}, True),
        ({"name": ["^eb"]}, False),
        ({"name": ["(a+)+$"]}, False),
        ({"label": ["a"]}, True),
        ({"label": ["a=c"]}, False),
        ({"status": ["running"]}, True),
        ({"status": ["exited", "paused"]}, False),
        ({"is-task": ["true"]}, False),
        ({"is-task": ["false"]}, True),
        ({"exited": ["0"]}, False),
        ({"ancestor": ["nothing"]}, False),
        ({"health": ["none"]}, True),
        ({"health": ["healthy"]}, False),
    ],
)
async def test_filters_select(api: Api, run: Runner, filters: dict[str, list[str]], is_found: bool):
    await run.start("sleep", "100", name="web.1", labels={"a": "b"})
    _, found = await api.ask("GET", f"/containers/json?filters={json.dumps(filters)}")
    assert bool(found) is is_found


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ('filters={"bogus":["x"]}', 400, "Invalid filter 'bogus'"),
        ('filters={"status":["x"]}', 400, "Invalid filter 'status=x'"),
        ('filters={"health":["x"]}', 400, "Unrecognised filter value for health: x"),
        ('filters={"exited":["x"]}', 500, 'strconv.Atoi: parsing "x": invalid syntax'),
        ('filters={"is-task":["x"]}', 400, "Invalid filter 'is-task=[x]'"),
        ('filters={"before":["nosuch"]}', 500, "no such container nosuch"),
        ("limit=x", 500, 'strconv.Atoi: parsing "x": invalid syntax'),
    ],
)
async def test_a_bad_list_request_is_answered_with_dockers_words(
    api: Api, query: str, status: int, message: str
):
    assert await api.ask("GET", f"/containers/json?{query}") == (status, {"message": message})


async def test_ended_containers_are_listed_with_all_or_a_limit(api: Api, run: Runner):
    ended = await run.start("true")
    await run.engine.wait(ended.id)
    newer = await run.start("sleep", "100")
    assert [one["Id"] for one in (await api.ask("GET", "/containers/json"))[1]] == [newer.id]
    assert [one["Id"] for one in (await api.ask("GET", "/containers/json?all=1"))[1]] == [newer.id, ended.id]
    assert [one["Id"] for one in (await api.ask("GET", "/containers/json?limit=2"))[1]] == [
        newer.id,
        ended.id,
    ]
    _, [line] = await api.ask("GET", '/containers/json?filters={"exited":["0"]}&all=1')
    assert line["Status"].startswith("Exited (0) ")


async def test_inspect_shows_what_docker_shows(api: Api, run: Runner):
    container = await run.start("sleep", "100", env=("A=b",), memory_bytes=64 << 20)
    _, found = await api.ask("GET", f"/containers/{container.id[:12]}/json?size=1")
    assert found["State"]["Running"] is True
    assert found["State"]["Pid"] == container.pid
    assert (found["Path"], found["Args"]) == ("sleep", ["100"])
    assert found["Config"]["Env"] == ["A=b"]
    assert found["HostConfig"]["Memory"] == 64 << 20
    assert found["Name"] == f"/{container.name}"
    assert found["NetworkSettings"]["Networks"]
    assert "SizeRootFs" in found


def executed(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


async def test_top_lists_the_processes(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    await eventually(lambda: executed(container.pid) == "sleep", "runc has become the command")
    _, found = await api.ask("GET", f"/containers/{container.id}/top")
    assert found["Titles"][1] == "PID"
    assert found["Processes"][0][-1] == "sleep 100"


async def test_one_sample_of_what_it_uses(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    _, found = await api.ask("GET", f"/containers/{container.id}/stats?stream=0")
    assert found["name"] == f"/{container.name}"
    assert found["memory_stats"]["usage"] > 0
    assert found["precpu_stats"]["system_cpu_usage"] < found["cpu_stats"]["system_cpu_usage"]
    _, once = await api.ask("GET", f"/containers/{container.id}/stats?stream=0&one-shot=1")
    assert once["precpu_stats"]["cpu_usage"]["total_usage"] == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/containers/nosuch/json", 404, "No such container: nosuch"),
        ("GET", "/containers/nosuch/logs?stdout=1", 404, "No such container: nosuch"),
        ("POST", "/containers/nosuch/kill", 404, "Cannot kill container: nosuch: No such container: nosuch"),
        ("POST", "/containers/nosuch/wait", 404, "No such container: nosuch"),
        ("DELETE", "/containers/nosuch", 404, "No such container: nosuch"),
        ("GET", "/exec/nosuch/json", 404, "No such exec instance: nosuch"),
        ("POST", "/exec/nosuch/start", 404, "No such exec instance: nosuch"),
        ("POST", "/containers/{id}/kill?signal=BOGUS", 400, "Invalid signal: BOGUS"),
        ("POST", "/containers/{id}/exec", 400, "No exec command specified"),
        ("POST", "/containers/{id}/resize?h=x&w=1", 400, 'strconv.Atoi: parsing "x": invalid syntax'),
        ("POST", "/containers/{id}/stop?t=x", 500, 'strconv.Atoi: parsing "x": invalid syntax'),
        ("POST", "/containers/{id}/wait?condition=bogus", 400, 'invalid condition: "bogus"'),
        ("GET", "/containers/{id}/logs", 400, "Bad parameters: you must choose at least one stream"),
        ("POST", "/containers/{id}/unpause", 500, "Container {id} is not paused"),
        (
            "DELETE",
            "/containers/{id}",
            409,
            'cannot remove container "{id}": container is running: stop the container before removing or force remove',
        ),
    ],
)
async def test_a_bad_request_is_answered_with_dockers_words(
    api: Api, run: Runner, method: str, path: str, status: int, message: str
):
    container = await run.start("sleep", "100")
    body = {} if path.endswith(("/exec", "/start")) else None
    response = await api.ask(method, path.format(id=container.id), body)
    assert response == (status, {"message": message.format(id=container.id)})


async def test_an_ended_container_refuses_what_needs_a_process(api: Api, run: Runner):
    container = await run.start("true")
    await run.engine.wait(container.id)
    gone = (409, {"message": f"Container {container.id} is not running"})
    assert await api.ask("GET", f"/containers/{container.id}/top") == gone
    assert await api.ask("POST", f"/containers/{container.id}/resize?h=1&w=1") == gone
    assert await api.ask("POST", f"/containers/{container.id}/exec", {"Cmd": ["x"]}) == gone
    assert (await api.ask("POST", f"/containers/{container.id}/stop"))[0] == 304


# --- output -----------------------------------------------------------------------------------------------------


async def test_what_old_clients_give_is_honored_or_refused(api: Api, run: Runner):
    container = await run.start("sleep", "100", plain=PlainOptions())
    other = await run.create("sleep", "100", name="other", init=True, plain=PlainOptions())

    async def refused(method: str, path: str, body: Any = None, version: str = "1.41") -> tuple[int, str]:
        status, response = await api.ask(method, path, body, version=version)
        return status, response["message"]

    start = f"/containers/{other.id}/start"
    assert await refused("POST", start, {"Binds": ["/a:/b"]}) == (
        400,
        "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24",
    )
    assert (await refused("POST", f"{start}?checkpoint=c1"))[0] == 400
    assert (await api.ask("POST", start, {}))[0] == 204
    assert await refused("DELETE", "/containers/other?link=1&force=1") == (
        409,
        "Conflict, cannot remove the default link name of the container",
    )
    rename = f"/containers/{container.id}/rename"
    assert await refused("POST", rename) == (400, "Neither old nor new names may be empty")
    status, message = await refused("POST", f"{rename}?name=other")
    assert status == 409
    assert message.startswith(
        'Error when allocating new name: Conflict. The container name "/other" is already'
    )
    assert (await api.ask("POST", "/containers/other/stop?t=", version="1.24"))[0] == 204
    waited = await api.ask("POST", "/containers/other/wait?condition=bogus", version="1.29")
    assert (waited[0], "StatusCode" in waited[1]) == (200, True)
    assert (await refused("POST", "/containers/other/wait?condition=bogus"))[0] == 400
    assert (await api.ask("OPTIONS", "/containers/json"))[0] == 200


async def test_a_name_that_looks_like_an_id_comes_before_the_beginning_of_one(api: Api, run: Runner):
    one = await run.create("true")
    named = await run.create("true", name=one.id[:12])

    async def found(word: str) -> Any:
        status, response = await api.ask("GET", f"/containers/{word}/json")
        return response["Id"] if status == 200 else (status, response["message"])

    assert await found(one.id) == one.id
    assert await found(one.id[:12]) == await found(f"%2F{named.name}") == named.id
    assert await found(one.id[:13]) == one.id
    first = {one.id[0], named.id[0]}
    while len(first) == len(run.engine.list()):
        first.add((await run.create("true")).id[0])
    shared = next(
        letter for letter in first if sum(each.id.startswith(letter) for each in run.engine.list()) > 1
    )
    assert await found(shared) == (400, f"multiple IDs found with provided prefix: {shared}")


async def test_logs_are_framed_and_chosen(api: Api, run: Runner):
    container = await run.start("sh", "-c", "echo one; echo two; echo bad >&2")
    await run.engine.wait(container.id)
    path = f"/containers/{container.id}/logs"
    _, content = await api.ask("GET", f"{path}?stdout=1")
    assert content == b"\x01\0\0\0\0\0\0\x04one\n\x01\0\0\0\0\0\0\x04two\n"
    _, content = await api.ask("GET", f"{path}?stderr=1")
    assert content == b"\x02\0\0\0\0\0\0\x04bad\n"
    _, content = await api.ask("GET", f"{path}?stdout=1&tail=1")
    assert content == b"\x01\0\0\0\0\0\0\x04two\n"
    _, content = await api.ask("GET", f"{path}?stdout=1&tail=1&timestamps=1&details=1")
    stamp, rest = content[8:].split(b" ", 1)
    assert len(stamp) == len("2026-01-01T00:00:00.000000000Z")
    assert rest == b" two\n"


async def test_followed_logs_come_at_once_and_end_with_the_container(api: Api, run: Runner):
    container = await run.start("sh", "-c", "echo first; read x; echo last", open_stdin=True)
    output = run.lab.paths.containers / container.id / "log" / "current"
    await eventually(lambda: output.exists() and b"first" in output.read_bytes(), "it has begun")
    reading = asyncio.ensure_future(api.ask("GET", f"/containers/{container.id}/logs?stdout=1&follow=1"))
    attached = await api.hijack(f"/containers/{container.id}/attach?stream=1&stdin=1&stdout=1")
    assert attached.head.startswith("HTTP/1.1 101 UPGRADED\r\n")
    attached.writer.write(b"go\n")
    _, content = await asyncio.wait_for(reading, 10)
    assert content == b"\x01\0\0\0\0\0\0\x06first\n\x01\0\0\0\0\0\0\x05last\n"
    assert await attached.frames() == [(1, b"last\n")]
    attached.writer.close()


async def test_wait_answers_its_head_at_once_and_its_body_at_the_end(api: Api, run: Runner):
    container = await run.start("sh", "-c", "read x; exit 7", open_stdin=True)
    reader, writer = await asyncio.open_unix_connection(api.socket)
    writer.write(f"POST /v1.41/containers/{container.id}/wait HTTP/1.1\r\nHost: node\r\n\r\n".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    attached = await api.hijack(f"/containers/{container.id}/attach?stream=1&stdin=1")
    attached.writer.write(b"go\n")
    await reader.readline()
    assert json.loads(await asyncio.wait_for(reader.readline(), 5)) == {"StatusCode": 7, "Error": None}
    writer.close()
    attached.writer.close()


# --- doing --------------------------------------------------------------------------------------------------------


async def test_stop_kill_pause_and_remove(api: Api, run: Runner):
    container = await run.start("sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done")
    path = f"/containers/{container.id}"
    assert (await api.ask("POST", f"{path}/pause"))[0] == 204
    assert await api.ask("POST", f"{path}/pause") == (
        409,
        {"message": f"Container {container.id} is already paused"},
    )
    assert (await api.ask("POST", f"{path}/unpause"))[0] == 204
    assert (await api.ask("POST", f"{path}/stop?t=5"))[0] == 204
    assert run.engine.get(container.id).exit_code == 9
    assert (await api.ask("DELETE", path))[0] == 204
    assert (await api.ask("GET", f"{path}/json"))[0] == 404


async def test_limits_change_while_it_runs(api: Api, run: Runner):
    container = await run.start("sleep", "100", memory_bytes=64 << 20)
    status, response = await api.ask("POST", f"/containers/{container.id}/update", {"PidsLimit": 50})
    assert (status, response) == (200, {"Warnings": None})
    found = run.engine.get(container.id).config
    assert (found.pids, found.memory_bytes) == (50, 64 << 20)


async def test_docker_update_sets_every_limit_and_the_restart_policy(api: Api, run: Runner):
    plain = PlainOptions(mode=NetworkMode.NONE)
    container = await run.start("sleep", "100", name="c1", memory_bytes=64 << 20, plain=plain)
    limits = ("--memory", "128m", "--memory-reservation", "32m", "--cpu-shares", "512", "--pids-limit", "50")
    processors = ("--cpuset-cpus", "0", "--cpu-period", "50000", "--cpu-quota", "25000")
    restart = ("--memory-swap", "-1", "--restart", "on-failure:2")
    assert await api.docker("update", *limits, *processors, *restart, "c1") == (0, "c1\n", "")
    _, found = await api.ask("GET", "/containers/c1/json")
    host = found["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["MemoryReservation"]) == (128 << 20, -1, 32 << 20)
    assert (host["CpuPeriod"], host["CpuQuota"], host["NanoCpus"]) == (50_000, 25_000, 0)
    assert (host["CpuShares"], host["CpusetCpus"], host["PidsLimit"]) == (512, "0", 50)
    assert host["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 2}
    groups = Cgroups(run.lab.cgroup_parent)
    files = {"cpu": "cpu.max"} if groups.is_v2 else {"cpu": "cpu.cfs_quota_us", "cpuset": "cpuset.cpus"}
    kernels = []
    for controller, name in {**files, "pids": "pids.max"}.items():
        directory = groups.directory(container, controller)
        assert directory is not None
        kernels.append((directory / name).read_text().strip())
    assert kernels == (["25000 50000", "50"] if groups.is_v2 else ["25000", "0", "50"])
    assert (await run.engine.stats(container.id)).memory_stats.limit == 128 << 20
    assert await api.docker("update", "--memory", "1g", "--memory-swap", "512m", "c1") == (
        1,
        "",
        "Error response from daemon: Minimum memoryswap limit should be larger than memory limit, see usage\n",
    )


async def test_a_tasks_container_is_not_renamed(api: Api, run: Runner):
    container = await run.start("sleep", "100")
    status, response = await api.ask("POST", f"/containers/{container.id}/rename?name=x")
    assert status == 501
    assert response["message"].endswith(".")


# --- the docker command -----------------------------------------------------------------------------------------------


async def test_docker_exec_passes_input_output_and_exit_code(api: Api, run: Runner):
    await run.start("sleep", "100", name="c1")
    assert await api.docker("exec", "c1", "sh", "-c", "echo hi; exit 4") == (4, "hi\n", "")
    assert await api.docker("exec", "-i", "c1", "sh", "-c", "cat; echo done", stdin=b"in\n") == (
        0,
        "in\ndone\n",
        "",
    )


async def test_docker_ps_logs_top_inspect_wait_and_rm(api: Api, run: Runner):
    container = await run.start("sh", "-c", "echo out; echo err >&2; exec sleep 100", name="c1")
    await eventually(lambda: executed(container.pid) == "sleep", "it has written")
    code, output, _ = await api.docker("ps", "--format", "{{.ID}} {{.Names}} {{.State}}")
    assert (code, output) == (0, f"{container.id[:12]} c1 running\n")
    code, output, errors = await api.docker("logs", "c1")
    assert (code, output, errors) == (0, "out\n", "err\n")
    assert "sleep 100" in (await api.docker("top", "c1"))[1]
    assert (await api.docker("inspect", "-f", "{{.State.Status}}", "c1"))[1] == "running\n"
    waiting = asyncio.ensure_future(api.docker("wait", "c1"))
    await api.docker("kill", "c1")
    assert (await waiting)[1] == "137\n"
    assert (await api.docker("rm", "c1"))[:2] == (0, "c1\n")


async def test_an_image_for_another_platform_than_the_user_names_is_not_run(api: Api) -> None:
    here, body = this_platform(), {"Image": "busybox", "Cmd": ["true"]}
    for platform in ("linux/s390x", f"windows/{here.architecture}"):
        status, error = await api.ask("POST", f"/containers/create?platform={platform}", body)
        found = f"image with reference busybox was found but its platform ({here})"
        wanted = f"does not match the specified platform ({platform})"
        assert (status, error["message"]) == (404, f"{found} {wanted}")
    assert (await api.ask("POST", "/containers/create?platform=a/b/c/d", body))[0] == 400
    assert (await api.ask("POST", f"/containers/create?platform={here}", body))[0] == 201
