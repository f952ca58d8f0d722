"""The manager process: its etcd, its store, and the manager on top of them, until SIGTERM.

The node process starts it, and it may outlive the node process.  It starts in this order: checks of the disk, the etcd
member, the store (which it founds first if this node founds a cluster), then everything that serves the store.
"""

import asyncio
import errno
import signal
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import msgspec
import structlog

from skep import logs
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, SystemClock
from skep.aio.event_loop import gc_settings
from skep.aio.event_loop.child_watcher import watch_children_by_pidfd
from skep.aio.failures import describe_error
from skep.aio.groups import errors_as_they_are
from skep.aio.trees import remove_tree
from skep.bootstrap import FUTILE, REMOVED, STARVED, ManagerConfig, encode, load, load_recovery
from skep.errors import SkepError
from skep.linux.files import file_exists, replace_file
from skep.logs import LogSettings
from skep.manager.ca.own_expiry import self_renewed, wait_renewed
from skep.manager.ca.peer_files import place_revoked
from skep.manager.manager import Manager
from skep.manager.membership.joining import JoiningManager, JoinRefused
from skep.manager.membership.peer_addresses import PeerAddresses
from skep.manager.membership.peer_ports import unreachable_peers
from skep.manager.membership.peer_search import PeerSearch
from skep.manager.routes import compile_routes
from skep.manager.storage.founding import found_cluster
from skep.manager.storage.incarnation import (
    Superseded,
    check_incarnations,
    poll_other_managers,
    read_incarnations,
)
from skep.manager.storage.keys import founding_wrapping_key, save_wrapping_keys
from skep.manager.storage.recovery import finish_recovery, raise_if_restored, restore_if_wanted
from skep.manager.store_member import ConsensusMember
from skep.manager.telemetry.watchdog import watching
from skep.model.networks.addresses import parted
from skep.model.values.ids import new_id
from skep.model.values.times import timestamp
from skep.paths import Paths
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.crl import revocation_list
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock
from skep.security.reloading import KeyPairFiles
from skep.security.tls import ServerTls, client_context, unverified_context
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.initialize import InitUnfinished, initialize
from skep.store.etcd.membership import RaftMembers
from skep.store.etcd.peers import load_peers, save_peers
from skep.store.etcd.process.binary import find_binary
from skep.store.etcd.process.damage import Damaged
from skep.store.etcd.process.deadlines import end_peer_connections
from skep.store.etcd.process.flags import MemberSettings, PeerFiles
from skep.store.etcd.process.handover import hand_over
from skep.store.etcd.process.member import EtcdMember, MemberRemoved
from skep.store.etcd.store import EtcdStore, open_store
from skep.wire.server import Bound, serve

log = structlog.get_logger(__name__)

USUAL_START_S = 1.0
"""Upper bound in seconds for a start with a quorum."""
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}


def run(paths: Paths) -> None:
    """Run the manager of the node in ``paths`` until SIGTERM.  Raises: SystemExit: it cannot continue.

    The paths in its settings are replaced.  The data directory may be a copy, which must not use the original's paths.
    """
    try:
        config = msgspec.structs.replace(
            load(paths.manager_config), data_dir=str(paths.data), run_dir=str(paths.run)
        )
        logs.name_process("manager")
        logs.follow(config.paths.log_settings)
        watch_children_by_pidfd()
        asyncio.run(_until_stopped(config))
    except Exception as error:
        refusal = refusal_in(error)
        if refusal is None:
            raise
        log.error(
            "manager failed: the machine refused a resource", reason=describe_error(refusal), exc_info=error
        )
        _write_last_words(paths, describe_error(refusal))
        raise SystemExit(STARVED) from error


def refusal_in(error: BaseException) -> OSError | None:
    """Return the refusal of a resource by the machine that caused ``error``, if any.  The next start may succeed."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(refusal_in, error.exceptions)), None)
    return error if isinstance(error, OSError) and error.errno in _REFUSALS else None


def _write_mark(mark: Path, words: str) -> None:
    """Write ``words`` to a mark file that the node process shows, or remove the file if ``words`` is empty."""
    with suppress(OSError):  # a full disk may be the problem to report
        if words:
            replace_file(mark, words.encode(), is_durable=False)
        else:
            mark.unlink(missing_ok=True)


def _write_last_words(paths: Paths, words: str) -> None:
    """Write why this manager ends."""
    _write_mark(paths.last_words("manager"), words)


def prepare() -> None:
    """Run the slow part of the initialization that does not depend on the cluster, in a standby process before ``run``.

    The first signature and the first TLS context of a process take far longer than later ones.
    """
    compile_routes()
    revocation_list(())
    unverified_context()


async def _until_stopped(config: ManagerConfig) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            living = group.create_task(_serve_until_removed(config, SystemClock()), name="manager")
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, living.cancel)
    except (MemberRemoved, JoinRefused) as error:
        log.warning("manager removed from the cluster", reason=str(error))
        _write_last_words(config.paths, str(error))
        raise SystemExit(REMOVED) from error
    except SkepError as error:
        log.error("manager failed", reason=str(error))
        _write_last_words(config.paths, str(error))
        raise SystemExit(FUTILE if isinstance(error, Damaged | Superseded) else 1) from error
    log.info("manager stopped")


async def _serve_until_removed(config: ManagerConfig, clock: Clock) -> None:
    while True:
        try:
            return await _serve(config, clock)
        except MemberRemoved:
            if not file_exists(config.paths.joining_mark):
                raise
            log.warning("removed before it had a vote: joining again")
            await remove_tree(config.paths.etcd)
        except Damaged as error:
            if not file_exists(config.paths.joining_mark):
                raise
            # This member has never voted, because etcd ended while it was still contacting the others.
            raise JoinRefused(f"the store did not come up among the other managers: {error}") from error


async def _serve(config: ManagerConfig, clock: Clock) -> None:
    """Join the other managers if this one is new, then run it.  Raises: MemberRemoved."""
    paths, random = config.paths, SystemRandom()
    pair = await asyncio.to_thread(keypair.load, paths.certificates, KeyLock(paths))
    files = KeyPairFiles(paths.certificates, KeyLock(paths))
    if len(load_peers(paths.etcd)) > 1:
        pair = await wait_renewed(files, pair, clock)
    joining = JoiningManager(config.managers, pair, clock, random.random)
    configured = Path(config.etcd_binary) if config.etcd_binary else None
    binary = await asyncio.to_thread(find_binary, configured, paths.etcd_version)
    settings = _member_settings(config, paths, _write_peer_files(paths, pair))
    known = read_incarnations(paths) if load_recovery(paths) is not None else check_incarnations(paths)
    if await restore_if_wanted(paths, settings, binary, clock):
        settings = _member_settings(config, paths, settings.peer_files)
    if config.managers and not file_exists(settings.data / "member"):
        config, settings = await _join(config, settings, joining)
    is_empty = not config.managers and not file_exists(settings.data / "member")
    peer_addresses = PeerAddresses(load_peers(paths.etcd), partial(save_peers, paths.etcd))
    tls = partial(client_context, pair)
    peer_search = PeerSearch(
        config.node_id, config.advertise_addr, peer_addresses, config.look_at, tls, clock
    )
    async with AsyncExitStack() as stack:
        backoff = Backoff(longest_s=30.0, rng=random.random)
        member = EtcdMember(settings, binary, clock, backoff, partial(_write_mark, paths.store_full))
        if file_exists(paths.joining_mark):
            waiting = joining.vote(load_peers(paths.etcd), partial(_write_delay, paths.joining_mark))
        else:
            listening = _listening(config, pair, peer_search)
            waiting = _wait_for_others(
                paths.manager_waiting, peer_search, listening, clock, lambda: member.error
            )
        poll = poll_other_managers(
            paths, known.served, load_peers(paths.etcd), client_context(pair), config.node_id, clock
        )
        await _start_member(member, stack, poll, waiting)
        paths.joining_mark.unlink(missing_ok=True)
        await raise_if_restored(paths, paths.etcd_socket, clock)
        client = await stack.enter_async_context(EtcdClient(paths.etcd_socket))
        members = RaftMembers(client, member)
        await members.count()
        store = await _open(config, paths, pair, clock, random, stack, members, is_empty=is_empty)
        await finish_recovery(paths, store, config.node_id, config.advertise_addr, pair.certificate)
        pair = await self_renewed(store, pair, files, clock)
        gc_settings.configure_gc()  # excludes the loaded replica from garbage collections, which halves their time
        own_member = ConsensusMember(
            consensus=members,
            peer_addresses=peer_addresses,
            peer_search=peer_search,
            restart=lambda: member.restart(member.settings),
            cut_peers=lambda: end_peer_connections(member.pid, member.settings.peer_port),
            error=lambda: member.error,
        )
        manager = Manager(config, store, pair, own_member, clock, new_id, random)
        with watching(partial(hand_over, paths.etcd_socket), partial(_write_last_words, paths), clock):
            await manager.run()


async def _start_member(
    member: EtcdMember, stack: AsyncExitStack, *meanwhile: Coroutine[Any, Any, object]
) -> None:
    """Start etcd and wait until it serves.  ``meanwhile`` runs until then."""
    async with errors_as_they_are(), asyncio.TaskGroup() as group:
        tasks = [group.create_task(one, name="while etcd starts") for one in meanwhile]
        await stack.enter_async_context(member.running())
        for task in tasks:
            task.cancel()


async def _wait_for_others(
    mark: Path,
    peer_search: PeerSearch,
    listening: AbstractAsyncContextManager[object],
    clock: Clock,
    error: Callable[[], str],
) -> None:
    """Announce this manager's address while it waits for a quorum, until cancelled.

    The others may have returned with other addresses than this manager has stored.

    Args:
        mark: File that exists while the manager waits.  The node process reads it.
        error: Returns the member's own problem as a sentence, which is written to the mark.
    """
    mark.unlink(missing_ok=True)
    await clock.sleep(USUAL_START_S)
    log.warning("no quorum yet: searching for the other managers")
    mark.write_text(error())
    try:
        async with listening:
            await peer_search.search()
    finally:
        mark.unlink(missing_ok=True)


def _listening(
    config: ManagerConfig, pair: KeyPair, peer_search: PeerSearch
) -> AbstractAsyncContextManager[Bound]:
    """Serve the manager's port before the store exists.  It only serves the search for other managers."""
    host, port = parted(config.listen_addr)
    return serve(
        peer_search.services(),
        host=host,
        port=int(port),
        tls=ServerTls(pair).front,
        cluster_id=config.cluster_id,
        check_certificate=peer_search.require_known,
    )


async def _join(
    config: ManagerConfig, settings: MemberSettings, joining: JoiningManager
) -> tuple[ManagerConfig, MemberSettings]:
    """Join the other managers and store the result.  Raises: SkepError: a final refusal."""
    paths = config.paths
    _, listen_port = parted(config.listen_addr)
    addr = config.advertise_addr or f":{listen_port}"
    admission = await joining.admission(addr, settings.peer_port)
    config = msgspec.structs.replace(config, advertise_addr=admission.addr)
    settings = msgspec.structs.replace(
        settings, joins=admission.peers, is_solo=False, cluster_token=admission.cluster_token
    )
    paths.etcd.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The reason is written before etcd starts, because etcd ends early if it reaches no peer.
    delay = await unreachable_peers(admission.peers, config.node_id)
    kept = (
        partial(save_wrapping_keys, paths, admission.wrapping_key),
        partial(save_peers, paths.etcd, admission.peers),
        partial(replace_file, paths.manager_config, encode(config), mode=0o600),
        partial(replace_file, paths.joining_mark, delay.encode()),
    )
    # All files are written concurrently.  Without a store all of them are written again, so their order does not
    # matter.
    await asyncio.gather(*(asyncio.to_thread(keep) for keep in kept))
    log.info("admitted by the managers", addr=admission.addr, members=len(admission.peers))
    return config, settings


def _write_delay(mark: Path, reason: str) -> None:
    """Write why this manager has no vote yet, for the node process."""
    content = reason.encode()
    if file_exists(mark) and mark.read_bytes() != content:
        replace_file(mark, content, is_durable=False)


def _member_settings(config: ManagerConfig, paths: Paths, files: PeerFiles) -> MemberSettings:
    return MemberSettings(
        name=config.node_id,
        directory=paths.etcd,
        socket=paths.etcd_socket,
        peer_listen=config.peer_listen,
        peer_files=files,
        cluster_token=config.cluster_id,
        is_solo=len(load_peers(paths.etcd)) <= 1,
        has_hosts=True,
        quota_bytes=config.store_quota,
        is_debug=LogSettings.read(paths.log_settings).debug,  # fixed until etcd's next start
    )


def _write_peer_files(paths: Paths, pair: KeyPair) -> PeerFiles:
    """Write the node's key pair where etcd reads it.  The files are on tmpfs and do not survive a reboot."""
    keypair.save(pair, paths.tls)
    return PeerFiles(
        certificate=paths.tls / keypair.CERTIFICATE_FILE,
        key=paths.tls / keypair.KEY_FILE,
        roots=paths.tls / keypair.ROOT_FILE,
        revoked=place_revoked(paths.tls, paths.manager),
    )


async def _open(
    config: ManagerConfig,
    paths: Paths,
    pair: KeyPair,
    clock: Clock,
    random: Random,
    stack: AsyncExitStack,
    members: RaftMembers,
    *,
    is_empty: bool,
) -> EtcdStore:
    """Open the cluster's store, and found it first if it is empty and this node founds the cluster.

    Args:
        is_empty: Nothing was ever written to the store.

    Raises:
        FailedPrecondition: The cluster does not exist, and this manager has no settings for a new one.
    """
    wrapping_key = await asyncio.to_thread(founding_wrapping_key, paths)
    if is_empty:
        await _initialize_store(config, paths, pair, clock, wrapping_key)
    opening = partial(
        open_store,
        *(paths.etcd_socket, config.node_id, wrapping_key, clock),
        rng=random.random,
        quota_bytes=config.store_quota,
        is_only_member=members.is_only_member,
    )
    try:
        store = await stack.enter_async_context(opening())
    except InitUnfinished:
        await _initialize_store(config, paths, pair, clock, wrapping_key)
        store = await stack.enter_async_context(opening())
    # The root key is now only in the store, encrypted.
    paths.root_ca_key.unlink(missing_ok=True)
    return store


async def _initialize_store(
    config: ManagerConfig, paths: Paths, pair: KeyPair, clock: Clock, wrapping_key: bytes
) -> None:
    """Write a new cluster into the store.  Raises: the errors of ``initialize``."""
    root_key = await asyncio.to_thread(paths.root_ca_key.read_bytes)
    await initialize(
        paths.etcd_socket,
        wrapping_key,
        clock,
        found_cluster,
        config,
        Authority.load(root_key, pair.root_pem),
        pair.certificate,
        new_id=new_id,
        now=timestamp(clock.now_ns()),
    )
    log.info("cluster founded", cluster=config.cluster_id)
