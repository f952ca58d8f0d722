"""The manager process: its etcd, its store, and the manager on top, until SIGTERM.

Started by the node process, which it outlives.  The order is that of trust: what the disk says, the member, a cluster
(founded if the node was told to), then everything that serves it.
"""

import asyncio
import errno
import signal
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from random import Random, SystemRandom

import msgspec
import structlog

from skep import logs
from skep.aio import gc_settings
from skep.aio.backoff import Backoff
from skep.aio.child_watcher import watch_children_by_pidfd
from skep.aio.clock import Clock, SystemClock
from skep.aio.failures import describe_error
from skep.aio.groups import errors_as_they_are
from skep.aio.trees import remove_tree
from skep.bootstrap import FUTILE, REMOVED, STARVED, ManagerConfig, encode, load, load_recovery
from skep.errors import SkepError
from skep.linux.files import replace_file
from skep.logs import LogSettings
from skep.manager.ca.own import renewed_by_itself, wait_renewed
from skep.manager.ca.peer_files import place_revoked
from skep.manager.founding import found_cluster
from skep.manager.incarnation import Superseded, ask_others, check_incarnations, read_incarnations
from skep.manager.keys import founding_wrapping_key, save_wrapping_keys
from skep.manager.manager import Manager
from skep.manager.membership.addresses import AddressBook
from skep.manager.membership.joining import Applicant, NotLetIn
from skep.manager.membership.ways import closed_ways
from skep.manager.membership.whereabouts import Whereabouts
from skep.manager.recovery import finish_recovery, raise_if_restored, restore_if_wanted
from skep.manager.routes import compile_routes
from skep.manager.waiting import wait_for_others
from skep.manager.watchdog import watching
from skep.model.addresses import parted
from skep.model.ids import new_id
from skep.model.times import timestamp
from skep.paths import Paths
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.crl import revocation_list
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock
from skep.security.reloading import KeyPairFiles
from skep.security.tls import ServerTls, client_context, unverified_context
from skep.store.etcd.binary import find_binary
from skep.store.etcd.client import Client
from skep.store.etcd.damage import Damaged
from skep.store.etcd.deadlines import end_peer_connections
from skep.store.etcd.flags import MemberSettings, PeerFiles
from skep.store.etcd.handover import hand_over
from skep.store.etcd.initialize import Unfinished, initialize
from skep.store.etcd.member import Member, MemberRemoved
from skep.store.etcd.membership import RaftMembers
from skep.store.etcd.peers import load_peers, save_peers
from skep.store.etcd.store import EtcdStore, open_store
from skep.wire.server import Bound, serve

log = structlog.get_logger(__name__)

_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}


def run(paths: Paths) -> None:
    """Run the manager of the node in ``paths`` until SIGTERM.  Raises: SystemExit: it cannot go on.

    Its settings may have been written elsewhere: a data directory can be copied, and then must not lead back.
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
        log.error("manager cannot go on", reason=describe_error(refusal), exc_info=error)
        _say_last(paths, describe_error(refusal))
        raise SystemExit(STARVED) from error


def refusal_in(error: BaseException) -> OSError | None:
    """What the machine refused, if that is what ``error`` comes from: it may be there the next time."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(refusal_in, error.exceptions)), None)
    return error if isinstance(error, OSError) and error.errno in _REFUSALS else None


def _tell(mark: Path, words: str) -> None:
    """Leave ``words`` for the node process, which shows them; empty: what was there holds no more."""
    with suppress(OSError):  # the disk may be what they are about
        if words:
            replace_file(mark, words.encode(), is_durable=False)
        else:
            mark.unlink(missing_ok=True)


def _say_last(paths: Paths, words: str) -> None:
    """Why this manager ends."""
    _tell(paths.last_words("manager"), words)


def prepare() -> None:
    """What is the same for every cluster, and takes time: for a process that stands by, ahead of ``run``.

    The first signature and the first TLS context of a process take far longer than the next ones.
    """
    compile_routes()
    revocation_list(())
    unverified_context()


async def _until_stopped(config: ManagerConfig) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            living = group.create_task(_live(config, SystemClock()), name="manager")
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, living.cancel)
    except (MemberRemoved, NotLetIn) as error:
        log.warning("manager ends", reason=str(error))
        _say_last(config.paths, str(error))
        raise SystemExit(REMOVED) from error
    except SkepError as error:
        log.error("manager cannot go on", reason=str(error))
        _say_last(config.paths, str(error))
        raise SystemExit(FUTILE if isinstance(error, Damaged | Superseded) else 1) from error
    log.info("manager stopped")


async def _live(config: ManagerConfig, clock: Clock) -> None:
    while True:
        try:
            return await _take_part(config, clock)
        except MemberRemoved:
            if not config.paths.joining_mark.exists():
                raise
            log.warning("removed before the vote: coming in again")
            await remove_tree(config.paths.etcd)
        except Damaged as error:
            if not config.paths.joining_mark.exists():
                raise
            # Nothing of it was ever promised: etcd ended while it was still asking the others who they are.
            raise NotLetIn(f"the store did not come up among the other managers: {error}") from error


async def _take_part(config: ManagerConfig, clock: Clock) -> None:
    """Come in if this manager is new, then run it.  Raises: MemberRemoved."""
    paths, random = config.paths, SystemRandom()
    pair = await asyncio.to_thread(keypair.load, paths.certificates, KeyLock(paths))
    files = KeyPairFiles(paths.certificates, KeyLock(paths))
    if len(load_peers(paths.etcd)) > 1:
        pair = await wait_renewed(files, pair, clock)
    applicant = Applicant(config.managers, pair, clock, random.random)
    configured = Path(config.etcd_binary) if config.etcd_binary else None
    binary = await asyncio.to_thread(find_binary, configured, paths.etcd_version)
    settings = _member_settings(config, paths, _write_peer_files(paths, pair))
    lives = read_incarnations(paths) if load_recovery(paths) is not None else check_incarnations(paths)
    if await restore_if_wanted(paths, settings, binary, clock):
        settings = _member_settings(config, paths, settings.peer_files)
    if config.managers and not (settings.data / "member").exists():
        config, settings = await _come_in(config, settings, applicant)
    is_empty = not config.managers and not (settings.data / "member").exists()
    book = AddressBook(load_peers(paths.etcd), partial(save_peers, paths.etcd))
    whereabouts = Whereabouts(
        config.node_id, config.advertise_addr, book, config.look_at, partial(client_context, pair), clock
    )
    async with AsyncExitStack() as stack:
        backoff = Backoff(longest_s=30.0, rng=random.random)
        member = Member(settings, binary, clock, backoff, partial(_tell, paths.store_full))
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            asking = ask_others(
                paths, lives.served, load_peers(paths.etcd), client_context(pair), config.node_id, clock
            )
            if paths.joining_mark.exists():
                waiting = applicant.vote(load_peers(paths.etcd), partial(_note_hindrance, paths.joining_mark))
            else:
                listening = _listening(config, pair, whereabouts)
                waiting = wait_for_others(
                    paths.manager_waiting, whereabouts, listening, clock, lambda: member.error
                )
            meanwhile = (
                group.create_task(asking, name="ask others"),
                group.create_task(waiting, name="wait for a vote, or for others"),
            )
            await stack.enter_async_context(member.running())
            for task in meanwhile:
                task.cancel()
        paths.joining_mark.unlink(missing_ok=True)
        await raise_if_restored(paths, paths.etcd_socket, clock)
        store = await _open(config, paths, pair, clock, random, stack, is_empty=is_empty)
        await finish_recovery(paths, store, config.node_id, config.advertise_addr)
        pair = await renewed_by_itself(store, pair, files, clock)
        client = await stack.enter_async_context(Client(paths.etcd_socket))
        consensus = RaftMembers(client, member)
        gc_settings.configure_gc()  # the loaded replica is looked at by no collection; it halves the time of one
        manager = Manager(
            config,
            store,
            pair,
            consensus=consensus,
            book=book,
            whereabouts=whereabouts,
            restart_member=lambda: member.restart(member.settings),
            cut_peers=lambda: end_peer_connections(member.pid, member.settings.peer_port),
            trouble=lambda: member.error,
            socket=paths.manager_socket,
            clock=clock,
            new_id=new_id,
            random=random,
        )
        with watching(partial(hand_over, paths.etcd_socket), partial(_say_last, paths), clock):
            await manager.run()


def _listening(
    config: ManagerConfig, pair: KeyPair, whereabouts: Whereabouts
) -> AbstractAsyncContextManager[Bound]:
    """The manager's port while there is nothing yet to serve but where it is."""
    host, port = parted(config.listen_addr)
    return serve(
        whereabouts.services(),
        host=host,
        port=int(port),
        tls=ServerTls(pair).front,
        cluster_id=config.cluster_id,
        standing=whereabouts.require_known,
    )


async def _come_in(
    config: ManagerConfig, settings: MemberSettings, applicant: Applicant
) -> tuple[ManagerConfig, MemberSettings]:
    """Be let in among the managers; what it was told is kept.  Raises: SkepError: it will never be."""
    paths = config.paths
    _, listen_port = parted(config.listen_addr)
    addr = config.advertise_addr or f":{listen_port}"
    admission = await applicant.admission(addr, settings.peer_port)
    config = msgspec.structs.replace(config, advertise_addr=admission.addr)
    settings = msgspec.structs.replace(
        settings, joins=admission.peers, is_solo=False, cluster_token=admission.cluster_token
    )
    paths.etcd.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Where it reaches none, etcd ends before anybody asks why there is no vote.
    hindrance = await closed_ways(admission.peers, config.node_id)
    kept = (
        partial(save_wrapping_keys, paths, admission.wrapping_key),
        partial(save_peers, paths.etcd, admission.peers),
        partial(replace_file, paths.manager_config, encode(config), mode=0o600),
        partial(replace_file, paths.joining_mark, hindrance.encode()),
    )
    # The disk is waited for once.  Without a store all of it is written anew, so no order matters.
    await asyncio.gather(*(asyncio.to_thread(keep) for keep in kept))
    log.info("let in among the managers", addr=admission.addr, members=len(admission.peers))
    return config, settings


def _note_hindrance(mark: Path, reason: str) -> None:
    """Have the node process read why this manager has no vote yet."""
    content = reason.encode()
    if mark.exists() and mark.read_bytes() != content:
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
        is_debug=LogSettings.read(paths.log_settings).debug,  # until etcd's next start
    )


def _write_peer_files(paths: Paths, pair: KeyPair) -> PeerFiles:
    """The node's key pair where etcd reads it: on tmpfs, gone with the next reboot."""
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
    *,
    is_empty: bool,
) -> EtcdStore:
    """The cluster's store; founded first if there is none and this node was told to.

    Args:
        is_empty: nothing was ever written to it.

    Raises: FailedPrecondition: there is no cluster, and this manager was not told to found one.
    """
    wrapping_key = await asyncio.to_thread(founding_wrapping_key, paths)
    if is_empty:
        await _found(config, paths, pair, clock, wrapping_key)
    opening = partial(
        open_store,
        *(paths.etcd_socket, config.node_id, wrapping_key, clock),
        rng=random.random,
        quota_bytes=config.store_quota,
    )
    try:
        store = await stack.enter_async_context(opening())
    except Unfinished:
        await _found(config, paths, pair, clock, wrapping_key)
        store = await stack.enter_async_context(opening())
    # From here on the root's key lies encrypted in the store, and nowhere else.
    paths.root_ca_key.unlink(missing_ok=True)
    return store


async def _found(
    config: ManagerConfig, paths: Paths, pair: KeyPair, clock: Clock, wrapping_key: bytes
) -> None:
    """Write a new cluster into the store.  Raises: as ``initialize``."""
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
