"""Joins the modules of a page into one script, so that a browser sends one request instead of forty in turn.

Each module but the page's own becomes a function that is called once, so its names stay private.  Its exports become an
object named after the module.  The modules themselves stay separate in the sources and tests (``static/``).
"""

import re
from collections.abc import Mapping
from typing import Final

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
