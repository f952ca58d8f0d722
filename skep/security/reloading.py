"""A manager's server follows the node's certificate, which the agent of the same machine renews."""

import asyncio
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.security import keypair
from skep.security.locking import KeyLock
from skep.security.tls import ServerTls

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 5.0
"""A certificate is renewed with at least a fifth of its life left, so there is time."""


async def follow_key_pair(
    tls: ServerTls, directory: Path, clock: Clock, lock: KeyLock | None = None
) -> None:
    """Use the key pair in ``directory`` from the next handshake on, whenever it changes; until cancelled."""
    seen = _stamp(directory)
    while True:
        await clock.sleep(LOOK_EVERY_S)
        stamp = _stamp(directory)
        if stamp == seen:
            continue
        try:
            pair = await asyncio.to_thread(keypair.load, directory, lock)
        except SkepError as error:
            log.warning("certificate not taken over yet", error=str(error))
            continue
        tls.replace(pair)
        seen = stamp
        log.info("certificate taken over", until=pair.not_after.isoformat())


def _stamp(directory: Path) -> tuple[int, ...]:
    """Changes with each of the files; they are replaced, so their inodes change."""
    numbers: list[int] = []
    for name in (keypair.ROOT_FILE, keypair.CERTIFICATE_FILE, keypair.KEY_FILE):
        try:
            status = (directory / name).stat()
        except FileNotFoundError:
            numbers += (0, 0)
        else:
            numbers += (status.st_ino, status.st_mtime_ns)
    return tuple(numbers)
