"""The files of the dashboard, read once and served from memory by name.  No request reaches the file system.

The modules of a page are joined into one script, so that a browser sends one request instead of forty in turn.  Each
module except the page's own becomes a function that is called once, so its names stay private.  Its exports become an
object named after the module.  The sources (``static/``) and their tests have separate modules.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web

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


_IMPORT: Final = re.compile(r'^import \{ (\w+(?:, \w+)*) \} from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT: Final = re.compile(r"^export (?=(?:(?:async )?function\*? |class |const )(\w+))", re.MULTILINE)
_OTHER_FORM: Final = re.compile(r"^(?:import|export)\b.*|\bimport(?:\.meta|\().*", re.MULTILINE)


def joined(entry: str, modules: Mapping[str, str]) -> str:
    """Return ``entry`` and all its direct and indirect imports, in a browser's order of evaluation.

    Args:
        modules: Texts by name, without ``.js``.

    Raises:
        ValueError: An import or export has an unsupported form, modules import each other, or one is missing.
    """
    texts: dict[str, str] = {}
    _add(entry, modules, texts, ())
    return "".join(texts.values())


def _add(name: str, modules: Mapping[str, str], texts: dict[str, str], importers: tuple[str, ...]) -> None:
    if name in texts:
        return
    if name in importers:
        raise ValueError(f"modules import each other: {' '.join((*importers, name))}")
    if name not in modules:
        raise ValueError(f"{importers[-1] if importers else 'a page'} imports {name}.js, which is not there")
    for _, imported in _IMPORT.findall(modules[name]):
        _add(imported, modules, texts, (*importers, name))
    body, exported = _without_imports(name, modules[name])
    # Nothing imports a page's own module, so it needs no scope, and can await at its top level.
    texts[name] = (
        f"const ${name} = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();\n" if importers else body
    )


def _without_imports(name: str, text: str) -> tuple[str, str]:
    """Return a module's text with imports read from objects, and the names that it exports."""
    exported = ", ".join(_EXPORT.findall(text))
    body = _EXPORT.sub("", _IMPORT.sub(r"const { \1 } = $\2;", text)).rstrip()
    if other := _OTHER_FORM.search(body):
        raise ValueError(f"{name}.js: this form of import or export is not understood: {other[0]}")
    return body, exported
