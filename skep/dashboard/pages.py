"""The files of the dashboard, read once and served from memory by name.  No request reaches the file system.

Modules are served within the script of the page that needs them (``dashboard.script``).
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web

from skep.dashboard.script import joined

RELAY_HEADER: Final = "X-Skep-UI"
"""Header of requests by ``skep ui``.  A page of another origin cannot make a browser send it."""

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
"""Headers of every response to a browser."""

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
_SCRIPTS: Final = ("app", "login")
_FOLDER: Final = Path(__file__).with_name("static")


class Page(msgspec.Struct, frozen=True):
    """One file."""

    content: bytes
    content_type: str
    etag: str


@cache
def pages() -> Mapping[str, Page]:
    """Return all pages by name: files, and a script for each page.  The index also has the empty name."""
    modules = {file.stem: file.read_text() for file in _FOLDER.glob("*.js")}
    contents = {f"{name}.js": joined(name, modules).encode() for name in _SCRIPTS if name in modules}
    for file in sorted(_FOLDER.iterdir()):
        if file.is_file() and file.suffix != ".js":
            contents[file.name] = file.read_bytes()
    found = {}
    for name, content in contents.items():
        if (content_type := _TYPES.get(name.rpartition(".")[2])) is not None:
            found[name] = Page(content, content_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    if _INDEX in found:
        found[""] = found[_INDEX]
    return found


def page_response(page: Page, known: str) -> web.Response:
    """Return a page as a response.  ``known`` is the browser's cached version (``If-None-Match``)."""
    headers = {**SECURITY_HEADERS, "ETag": page.etag, "Cache-Control": "no-cache"}
    if page.etag in known:
        return web.Response(status=304, headers=headers)
    return web.Response(body=page.content, headers={**headers, "Content-Type": page.content_type})
