"""``skep daemon``: builds one node from its configuration and runs it.  It may import every other module.

The process becomes the zygote (see ``node.supervision.zygote``).  Its first child, the node process, checks the
machine, holds the lock of the data directory, and runs the node until SIGTERM.
"""

from skep.patches import memory as _first  # noqa: F401  before everything that it concerns

# isort: split
import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from random import SystemRandom

import msgspec
import structlog

from skep import logs
from skep.agent.tasks.last_resort import LastResort
from skep.aio.clock import SystemClock
from skep.aio.event_loop.child_watcher import watch_children_by_pidfd
from skep.aio.failures import log_error
from skep.aio.groups import first_alone
from skep.aio.trees import discard_tree_now
from skep.configuration.configuration import Configuration, ConfigurationError
from skep.configuration.settings import reload
from skep.configuration.sources import Arguments, LoadedConfiguration, load, parse_arguments
from skep.dataplane.net_process import process as net_process
from skep.dataplane.wireguard import process as wireguard_go
from skep.engine.log_drivers.drivers import sending_drivers
from skep.engine.log_drivers.options import log_config
from skep.errors import FailedPrecondition, InvalidArgument, SkepError
from skep.linux.detached import detached, held_lock, read_pid_file, set_title
from skep.linux.files import file_exists, replace_file
from skep.linux.own_user_namespace import is_rootless
from skep.logs import LogSettings
from skep.model.values.meta import Driver
from skep.model.values.user_map import UserMap
from skep.node.host import requirements, rootless, user_remap
from skep.node.host.conditions import Conditions
from skep.node.host.environment import NodeEnvironment
from skep.node.host.features import Features, detect
from skep.node.host.isolation import check_profile
from skep.node.host.machine import this_machine
from skep.node.host.reaping import adopt_orphans
from skep.node.host.runtime_choice import RuntimeChoice, choose, find_crun_problem, look_up
from skep.node.node import Node
from skep.node.supervision import zygote
from skep.node.supervision.processes import NodeProcesses
from skep.node.supervision.supervisor import STOP_GRACE_S, terminate
from skep.node.supervision.zygote import Zygote
from skep.paths import Paths
from skep.security.locking import KeyLock
from skep.store.etcd.process.binary import find_binary

log = structlog.get_logger()

_LOCK_WAIT_S = 2.0
"""Wait for the end of a node process that was killed a moment ago, and of its children."""

FORMAT = "1"
"""Layout version of the data directory."""


def main(argv: Sequence[str]) -> int:
    """Run the node that ``argv`` and the configuration files describe, until SIGTERM.  Return the exit code."""
    arguments = parse_arguments(argv)
    try:
        if arguments.is_rootless and not is_rootless():
            rootless.enter((sys.executable, *sys.orig_argv[1:]))
        if arguments.is_rootless:
            rootless.hide_machines_directories()
        loaded = load(arguments)
    except (ConfigurationError, FailedPrecondition) as error:
        return _refuse(error)
    _name_logs(loaded.configuration)
    os.umask(0o022)  # nothing is writable for others, but images' files are readable in containers
    os.chdir("/")  # the working directory may be removed, and a process without one cannot start others
    entries = {"net": _net, "manager": _manager}
    entries |= {
        wireguard_go.process_name(slot): partial(wireguard_go.enter, slot) for slot in wireguard_go.SLOTS
    }
    return zygote.host(entries, {"manager": _prepare_manager}, partial(_node, arguments, loaded))


def _node(arguments: Arguments, loaded: LoadedConfiguration, parent: Zygote) -> int:
    """Run the node process.  ``loaded`` is the configuration at the zygote's start."""
    set_title("skep-node")
    with suppress(ConfigurationError):  # not starting would not help
        loaded = load(arguments)
    _name_logs(loaded.configuration)
    watch_children_by_pidfd()
    try:
        with first_alone(SkepError):
            asyncio.run(Daemon(arguments, loaded, parent).run())
    except SkepError as error:
        return _refuse(error)
    finally:
        parent.close()
    return 0


def _name_logs(configuration: Configuration) -> None:
    logs.configure(debug=configuration.debug, log_format=configuration.log_format, process="node")


def _refuse(error: BaseException) -> int:
    for sentence in str(error).splitlines():
        sys.stderr.write(f"skep daemon: {sentence}\n")
    return 1


# --- processes forked by the zygote ---------------------------------------------------------------------------------


def _net(arguments: Sequence[str]) -> None:
    """Run the net process.  ``arguments`` are data and run directory."""
    logs.name_process("net")
    paths = _paths(arguments)
    logs.follow(paths.log_settings)
    net_process.run(paths, [LastResort(paths, SystemClock()).run])


def _manager(arguments: Sequence[str]) -> None:
    """Run the manager process.  ``arguments`` are data and run directory."""
    logs.name_process("manager")
    paths = _paths(arguments)
    with detached("manager", lock=paths.lock_file("manager"), pid_file=paths.pid_file("manager")):
        from skep.manager.process import run  # a worker does not import the manager

        run(paths)


def _prepare_manager() -> None:
    """Perform the part of a manager's start that needs no settings."""
    from skep.manager.process import prepare

    prepare()


def _paths(arguments: Sequence[str]) -> Paths:
    data, run = map(Path, arguments)
    return Paths(data, run)


# --- the node process -----------------------------------------------------------------------------------------------


class Daemon:
    """One node process, from its checks to its end."""

    def __init__(self, arguments: Arguments, loaded: LoadedConfiguration, parent: Zygote) -> None:
        self._arguments = arguments
        self._configuration = loaded.configuration
        self._warnings = loaded.warnings
        self._zygote = parent
        self._clock = SystemClock()
        self._random = SystemRandom()
        self._conditions = Conditions(self._clock)
        self._processes = NodeProcesses(
            loaded.configuration.paths,
            parent,
            self._clock,
            self._random.random,
            self._conditions,
            _hand_over,
        )

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT.  Raises: SkepError: the machine or the configuration is unusable."""
        stop, hangup = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, hangup.set)
        for sentence in self._warnings:
            log.warning("configuration", warning=sentence)
        runtimes = await asyncio.to_thread(self._choose_runtime)
        versions, _ = await asyncio.gather(
            asyncio.to_thread(self._check_machine, runtimes), asyncio.to_thread(self._check_profile)
        )
        users = await asyncio.to_thread(self._map_users)
        paths = self._configuration.paths
        with _sole_user(paths):
            _prepare(paths)
            _configure_logs(self._configuration)
            adopt_orphans()
            await end_forwarder(paths)
            features = await asyncio.to_thread(self._features)
            node = Node(
                self._configuration,
                NodeEnvironment(
                    machine=this_machine(),
                    features=features,
                    versions={**runtimes.versions, **versions},
                    runtimes=runtimes,
                    warnings=(*self._warnings, *runtimes.warnings),
                    clock=self._clock,
                    random=self._random,
                    conditions=self._conditions,
                    processes=self._processes,
                    users=users,
                ),
            )
            async with asyncio.TaskGroup() as group:
                running = group.create_task(node.run(self._ready), name="node")
                reloading = group.create_task(self._reload_on(hangup, node), name="reload")
                await stop.wait()
                log.info("stopping")
                self._processes.stop_with_node()
                self._zygote.notify("STOPPING=1")
                reloading.cancel()
                await node.announce_stop()
                running.cancel()
            await node.stop_containers()
            _forget_keys(paths)
            paths.features.unlink(missing_ok=True)

    def _ready(self) -> None:
        log.info("ready")
        self._zygote.notify("READY=1")

    def _choose_runtime(self) -> RuntimeChoice:
        configuration = self._configuration
        if configuration.executor != "oci":
            return RuntimeChoice()
        installed = look_up({"runc": configuration.runc, "crun": configuration.crun})
        choice = choose(installed, wanted=configuration.runtime, crun_problem=find_crun_problem())
        log.info("container runtime chosen", runtime=choice.default, reason=choice.reason)
        return choice

    def _check_machine(self, runtimes: RuntimeChoice) -> Mapping[str, str]:
        """Return the versions of the node's programs.  Raises: Unfit; FailedPrecondition."""
        configuration = self._configuration
        try:
            log_config(
                Driver(name=configuration.log_driver, options=configuration.log_opts), sending_drivers()
            )
        except InvalidArgument as error:
            raise FailedPrecondition(
                f"failed to set log opts: {error}: correct log-driver or log-opts"
            ) from error
        configuration.paths.run.mkdir(mode=0o711, parents=True, exist_ok=True)  # etcd's version is kept there
        tools = {
            requirements.CONMON: configuration.conmon,
            requirements.NFT: configuration.nft,
        }
        has_containers = configuration.executor == "oci"
        return requirements.check(
            configuration.data_dir,
            tools if has_containers else {},
            lambda: find_binary(configuration.etcd_binary, configuration.paths.etcd_version).version,
            lambda: (requirements.cgroup_problem(), runtimes.problem) if has_containers else (),
        )

    def _map_users(self) -> UserMap | None:
        """Return the mapping of containers' users.  Raises: SkepError: this machine cannot have it."""
        configuration = self._configuration
        if configuration.executor != "oci":
            return None
        paths = configuration.paths
        directories = (paths.images, paths.containers, paths.volumes)
        users = user_remap.load(configuration.userns_remap, directories, paths.run)
        if users is not None:
            uid, gid = users.root
            log.info("users of containers are mapped", user=configuration.userns_remap, uid=uid, gid=gid)
        elif configuration.userns_remap:
            log.warning("root cannot be mapped to itself: userns-remap is off")
        return users

    def _check_profile(self) -> None:
        if self._configuration.executor == "oci":
            check_profile(self._conditions)

    def _features(self) -> Features:
        """Return this machine's features.  After a crash, reuse the earlier result to start quickly."""
        path = self._configuration.paths.features
        try:
            return msgspec.json.decode(path.read_bytes(), type=Features)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            features = detect(self._configuration.paths.data, self._configuration.nft)
        try:
            replace_file(path, msgspec.json.encode(features), mode=0o600, is_durable=False)
        except OSError as error:  # the next process detects them again
            log_error(error, "detected features not written")
        return features

    async def _reload_on(self, hangup: asyncio.Event, node: Node) -> None:
        """Reload the configuration at every SIGHUP.  An invalid one changes nothing."""
        while True:
            await hangup.wait()
            hangup.clear()
            try:
                written = await asyncio.to_thread(load, self._arguments)
            except ConfigurationError as error:
                for problem in error.problems:
                    log.error("configuration not reloaded", problem=problem)
                continue
            for sentence in written.warnings:
                log.warning("configuration", warning=sentence)
            taken = reload(self._configuration, written.configuration)
            self._configuration = taken.configuration
            try:
                _configure_logs(taken.configuration)
                node.reload(taken.configuration)
            except Exception as error:  # settings that cannot be applied must not end the node
                log_error(error, "configuration not reloaded everywhere")
                continue
            log.info(
                "configuration reloaded",
                reloaded=", ".join(taken.reloaded) or "nothing changed",
                needs_restart=", ".join(taken.needs_restart) or "nothing",
            )


async def end_forwarder(paths: Paths) -> None:
    """End the process with which earlier versions encrypted networks.  It may have outlived its node process."""
    forwarder = read_pid_file(paths.pid_file("forwarder"))
    if forwarder is not None:
        log.info("forwarder of an earlier version ended", pid=forwarder.pid)
        await terminate(forwarder, STOP_GRACE_S)
    for name in ("forwarder.sock", "forwarder.plan"):
        (paths.run / name).unlink(missing_ok=True)


async def _hand_over(socket: Path) -> None:
    # Rarely needed, and the node process imports nothing of the store otherwise.
    from skep.store.etcd.process.handover import hand_over

    await hand_over(socket)


def _forget_keys(paths: Paths) -> None:
    """Lock a node with autolock at an orderly stop.  After a crash, the next process continues with the keys."""
    KeyLock(paths).forget()
    discard_tree_now(paths.tls)


def _configure_logs(configuration: Configuration) -> None:
    """Apply the log settings of ``configuration``, and write them for manager and net, which read them at SIGHUP."""
    settings = LogSettings(debug=configuration.debug, log_format=configuration.log_format)
    logs.configure(debug=settings.debug, log_format=settings.log_format)
    try:
        settings.write(configuration.paths.log_settings)
    except OSError as error:  # manager and net keep their settings
        log_error(error, "settings of logs not written")


@contextmanager
def _sole_user(paths: Paths) -> Iterator[None]:
    """Hold the lock of the data directory.  Raises: FailedPrecondition: another daemon holds it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(held_lock(paths.data_lock, wait_s=_LOCK_WAIT_S))
        except FailedPrecondition as error:
            raise FailedPrecondition(
                f"another skep daemon uses the data dir {paths.data}: "
                "stop it, or name another one with --data-dir"
            ) from error
        yield


def _prepare(paths: Paths) -> None:
    """Create the directories.  Raises: FailedPrecondition: the data directory has a newer layout."""
    for directory in (paths.run, paths.netns, paths.runc):
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    for directory in (paths.tasks, paths.networks, paths.images, paths.containers, paths.volumes):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not file_exists(paths.format):
        replace_file(paths.format, f"{FORMAT}\n".encode())
    elif (found := paths.format.read_text().strip()) != FORMAT:
        raise FailedPrecondition(
            f"the data dir {paths.data} has layout {found!r} and this version of skep supports {FORMAT!r}: "
            "run the version that wrote it, or name another one with --data-dir"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
