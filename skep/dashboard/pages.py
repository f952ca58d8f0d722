"""The files of the dashboard: read once, served from memory by name.  No request reaches the file system."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web

RELAY_HEADER: Final = "X-Skep-UI"
"""Of requests by ``skep ui``.  A page of another origin cannot have a browser send it."""

SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; manifest-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Of every response to a browser."""

_TYPES: Final[Mapping[str, str]] = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "json": "application/json",
    "webmanifest": "application/manifest+json",
    "svg": "image/svg+xml",
    "png": "image/png",
    "woff2": "font/woff2",
    "txt": "text/plain; charset=utf-8",
}
_INDEX: Final = "index.html"
_FOLDER: Final = Path(__file__).with_name("static")


class Page(msgspec.Struct, frozen=True):
    """One file."""

    content: bytes
    content_type: str
    etag: str


@cache
def pages() -> Mapping[str, Page]:
    """All files by name; the index also by the empty name."""
    found = {}
    for file in sorted(_FOLDER.iterdir()):
        content_type = _TYPES.get(file.name.rpartition(".")[2])
        if content_type is not None and file.is_file():
            content = file.read_bytes()
            found[file.name] = Page(content, content_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    if _INDEX in found:
        found[""] = found[_INDEX]
    return found


def page_response(page: Page, known: str) -> web.Response:
    """``known``: what the browser has of it already (``If-None-Match``)."""
    headers = {**SECURITY_HEADERS, "ETag": page.etag, "Cache-Control": "no-cache"}
    if page.etag in known:
        return web.Response(status=304, headers=headers)
    return web.Response(body=page.content, headers={**headers, "Content-Type": page.content_type})
