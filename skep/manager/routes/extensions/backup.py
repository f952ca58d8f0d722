"""``/skep/backup`` and ``/skep/cluster/rotate-keys``: maintenance of the store.  A Skep extension."""

from aiohttp import web

from skep.api.backups import BackupRequest
from skep.api.http.server import Routes, flag, read_json
from skep.manager.routes.access import manager_of

routes = Routes()


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
    async for piece in backups.pieces(sealer):
        await response.write(piece)
    await response.write_eof()
    return response


@routes.post("/skep/cluster/rotate-keys")
async def rotate_keys(request: web.Request) -> web.StreamResponse:
    """Start a rotation of the data keys."""
    await manager_of(request).store.rotate_data_key()
    return web.Response()
