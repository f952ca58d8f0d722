"""``/skep/backup``, ``/skep/cluster/rotate-keys``: maintenance of the store.  Ours, not Docker's."""

from aiohttp import web

from skep.api.backups import BackupRequest
from skep.api.server import Routes, read_json
from skep.manager.routes.access import manager_of

routes = Routes()


@routes.post("/skep/backup")
async def backup(request: web.Request) -> web.StreamResponse:
    """The file of a backup.  If it breaks off, its last piece is missing, which marks it as incomplete."""
    backups = manager_of(request).backups
    sealer = backups.begin(await read_json(request, BackupRequest))
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    await response.prepare(request)
    async for piece in backups.pieces(sealer):
        await response.write(piece)
    await response.write_eof()
    return response


@routes.post("/skep/cluster/rotate-keys")
async def rotate_keys(request: web.Request) -> web.StreamResponse:
    """Begin a rotation of the data keys."""
    await manager_of(request).store.rotate_data_key()
    return web.Response()
