"""From tasks to containers: sizes, placeholders, options, and when a registry is asked."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.agent.executor.interface import Rejected
from skep.agent.executor.pulling import RETRY_AFTER_S, Pulling
from skep.agent.executor.template import expand
from skep.agent.executor.wish import (
    NodeFacts,
    config,
    invocation,
    log_config,
    mount_point,
    parse_size,
    stop_signal,
)
from skep.engine.container import ContainerConfig
from skep.engine.images.digest import Digest
from skep.engine.images.image import ContainerDefaults, Image, ImageConfig
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable
from skep.model.container import (
    AppArmorOpts,
    ContainerSpec,
    CredentialSpec,
    Mount,
    Privileges,
    SeccompOpts,
    SELinuxContext,
    TmpfsOptions,
)
from skep.model.ids import NodeId
from skep.model.meta import Driver
from skep.model.service import TaskSpec
from skep.model.task import AssignedTask
from tests.support.builders import a_task

IMAGE = Image(id=Digest("sha256:" + "a" * 64), config=ImageConfig())
CONTEXT = {"Service": {"Name": "web", "Labels": {"a.b": "c"}}, "Task": {"Slot": "3"}}


@pytest.mark.parametrize(
    ("text", "size"),
    [("10m", 10 << 20), ("1.5GiB", 3 << 29), ("4096", 4096), ("1kb", 1024), ("2 T", 2 << 40), ("7B", 7)],
)
def test_sizes_are_read_as_docker_does(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=10))
def test_any_word_is_a_size_or_an_invalid_argument(text: str) -> None:
    with suppress(InvalidArgument):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("{{.Service.Name}}-{{ .Task.Slot }}", "web-3"),
        ('{{index .Service.Labels "a.b"}}', "c"),
        ('{{index .Service.Labels "none"}}', ""),
    ],
)
def test_placeholders_are_expanded(text: str, expected: str) -> None:
    assert expand(text, CONTEXT) == expected


@pytest.mark.parametrize(
    "text", ["{{.Nonsense}}", "{{.Service}}", "{{.Task.Slot.Deep}}", "{{range .}}", "{{}}"]
)
def test_what_is_no_placeholder_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="no such placeholder"):
        expand(text, CONTEXT)


IMAGE_SAYS = ContainerDefaults(entrypoint=("/entry",), cmd=("serve",))


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ((), (), (("/entry",), ("serve",))),
        ((), ("x",), (("/entry",), ("x",))),
        (("run",), (), (("run",), ())),
        (("run",), ("x",), (("run",), ("x",))),
    ],
)
def test_command_and_arguments_stand_over_the_images(
    command: tuple[str, ...], args: tuple[str, ...], expected: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    assert invocation(ContainerSpec(command=command, args=args), IMAGE_SAYS) == expected


def test_tmpfs_options_replace_their_opposites() -> None:
    mount = Mount(type="tmpfs", target="/t", tmpfs_options=TmpfsOptions(options=(("exec",), ("uid", "7"))))
    assert mount_point(mount, "", "").options == ("nosuid", "nodev", "rprivate", "exec", "uid=7")


def test_log_options_become_bounds() -> None:
    config = log_config(Driver(name="", options={"max-size": "10k", "max-file": "3"}))
    assert (config.type, config.max_size_bytes, config.max_files) == ("json-file", 10240, 3)
    assert log_config(Driver(name="local", options={"max-size": "-1"})).max_size_bytes == 0


class HandClock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def now_ns(self) -> int:
        return round(self.time * 1e9)

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


class Registry:
    """An image store whose registry answers as it is told."""

    def __init__(self, *, is_local: bool, error: SkepError | None) -> None:
        self.is_local = is_local
        self.error = error
        self.asked = 0
        self.answered = asyncio.Event()
        self.answered.set()

    def resolve(self, word: str) -> Image | None:
        if word == "UPPER":
            raise InvalidArgument("invalid reference format")
        return IMAGE if self.is_local else None

    def layers(self, image: Image) -> Sequence[Path]:
        return ()

    @asynccontextmanager
    async def pinned(self, chain: Sequence[str]) -> AsyncIterator[None]:
        yield

    async def pull(self, word: str, auth: str = "") -> Image:
        self.asked += 1
        await self.answered.wait()
        if self.error is not None:
            raise self.error
        self.is_local = True
        return IMAGE


async def test_an_image_comes_from_its_registry() -> None:
    registry = Registry(is_local=False, error=None)
    assert await Pulling(registry, HandClock()).image("busybox:1", "") == IMAGE
    assert registry.asked == 1


async def test_a_tag_is_asked_for_even_when_it_is_here() -> None:
    registry = Registry(is_local=True, error=None)
    await Pulling(registry, HandClock()).image("busybox:1", "")
    assert registry.asked == 1


@pytest.mark.parametrize("reference", ["busybox@sha256:" + "0" * 64, "sha256:" + "a" * 64, "a" * 12])
async def test_an_image_named_by_its_content_needs_no_registry(reference: str) -> None:
    registry = Registry(is_local=True, error=None)
    await Pulling(registry, HandClock()).image(reference, "")
    assert registry.asked == 0


async def test_without_its_registry_the_local_image_is_used_and_the_registry_left_alone_for_a_while() -> None:
    registry, clock = Registry(is_local=True, error=Unavailable("no route")), HandClock()
    pulling = Pulling(registry, clock)
    for _ in range(3):
        assert await pulling.image("busybox:1", "") == IMAGE
    assert registry.asked == 1
    await pulling.image("example.org/x", "")  # another registry
    assert registry.asked == 2
    clock.time += RETRY_AFTER_S
    await pulling.image("busybox:1", "")
    assert registry.asked == 3


@pytest.mark.parametrize("error", [Unavailable("no route"), NotFound("no such tag"), None])
async def test_neither_here_nor_to_be_had_is_rejected(error: SkepError | None) -> None:
    registry = Registry(is_local=False, error=error or Unavailable("x"))
    with pytest.raises(Rejected, match=rf"^No such image: nosuch:1: {error or 'x'}$"):
        await Pulling(registry, HandClock()).image("nosuch:1", "")


async def test_what_is_no_reference_is_rejected() -> None:
    with pytest.raises(Rejected, match="invalid reference format"):
        await Pulling(Registry(is_local=False, error=None), HandClock()).image("UPPER", "")


async def test_tasks_that_come_together_share_a_fetch() -> None:
    registry, clock = Registry(is_local=False, error=None), HandClock()
    pulling = Pulling(registry, clock)
    registry.answered.clear()
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            clock.time += 0.001
            group.create_task(pulling.image("busybox:1", ""))
            await asyncio.sleep(0)
        clock.time += 1
        registry.answered.set()
    assert registry.asked == 1


@pytest.mark.parametrize("name", ["", "INT", "SIGTERM", "15", "RTMIN+3"])
def test_a_stop_signal_is_taken_by_any_of_its_names(name: str) -> None:
    assert stop_signal(name) == name


def test_a_task_that_could_never_be_stopped_is_rejected() -> None:
    """It ran, and was in the way of its service's removal for good."""
    with pytest.raises(Rejected, match=r"^Invalid signal: NOSUCH$"):
        stop_signal("NOSUCH")


@pytest.mark.parametrize(
    ("privileges", "said"),
    [
        (
            Privileges(credential_spec=CredentialSpec(file="spec.json")),
            '^invalid --security-opt 2: "credentialspec=file://spec.json"$',
        ),
        (Privileges(selinux_context=SELinuxContext(level="s0:c100")), "no SELinux labels"),
    ],
)
def test_what_cannot_confine_here_is_rejected(privileges: Privileges, said: str) -> None:
    with pytest.raises(Rejected, match=said):
        configured(privileges)


def test_the_rest_of_a_services_privileges_reaches_its_containers() -> None:
    found = configured(
        Privileges(
            credential_spec=CredentialSpec(),
            selinux_context=SELinuxContext(disable=True),
            seccomp=SeccompOpts(mode="custom", profile=b"{}"),
            app_armor=AppArmorOpts(mode="disabled"),
            no_new_privileges=True,
        )
    )
    assert (found.seccomp, found.apparmor, found.no_new_privileges) == ("{}", "unconfined", True)


def configured(privileges: Privileges) -> ContainerConfig:
    spec = TaskSpec(container_spec=ContainerSpec(image="busybox:1", args=("true",), privileges=privileges))
    task = AssignedTask(task=replace(a_task("t1"), spec=spec))
    facts = NodeFacts(id=NodeId("n1"), hostname="m1")
    return config(task, facts, ContainerDefaults(), (), Driver())
