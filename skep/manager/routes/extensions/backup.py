"""``/skep/backup`` and ``/skep/cluster/rotate-keys``: maintenance of the store.  A Skep extension."""

import asyncio
from contextlib import suppress

from aiohttp import web

from skep.api.backups import BackupRequest
from skep.api.http.server import Routes, flag, read_json
from skep.errors import SkepError
from skep.manager.notify.records import note_backup
from skep.manager.routes.access import ManagerApi, manager_of
from skep.store.level import NOTIFICATIONS

routes = Routes()

_RECORD_S = 5.0
"""Time limit in seconds for the record of a backup.  The backup itself is complete by then."""


@routes.post("/skep/backup")
async def backup(request: web.Request) -> web.StreamResponse:
    """Send a backup file.  If it is interrupted, its last piece is missing, which marks the file as incomplete.

    With ``dryRun``, only check whether the client may create a backup and whether it could be restored.
    """
    backups = manager_of(request).backups
    if flag(request, "dryRun"):
        backups.check()
        return web.Response()
    sealer = backups.begin(await read_json(request, BackupRequest))
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    await response.prepare(request)
    try:
        async for piece in backups.pieces(sealer):
            await response.write(piece)
        await response.write_eof()
    except SkepError as error:
        await _record(manager_of(request), str(error))
        raise
    await _record(manager_of(request))
    return response


async def _record(manager: ManagerApi, error: str = "") -> None:
    """Record the end of a backup for notifications, unless the managers have no quorum: a backup needs none."""
    if manager.store.view().level < NOTIFICATIONS:
        return
    with suppress(SkepError, TimeoutError):
        async with asyncio.timeout(_RECORD_S):
            await manager.update(note_backup, error, manager.clock.now_ns())


@routes.post("/skep/cluster/rotate-keys")
async def rotate_keys(request: web.Request) -> web.StreamResponse:
    """Start a rotation of the data keys."""
    await manager_of(request).store.rotate_data_key()
    return web.Response()
