"""The modules of a page as one script: a browser asks once, and not for each of forty files in turn.

Each module but the page's own becomes a function that is called once, so its names stay its own; what it exports is an
object under the module's name.  The modules themselves stay what is written, read and tested (``static/``).
"""

import re
from collections.abc import Mapping
from typing import Final

_IMPORT: Final = re.compile(r'^import \{ (\w+(?:, \w+)*) \} from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT: Final = re.compile(r"^export (?=(?:(?:async )?function\*? |class |const )(\w+))", re.MULTILINE)
_OTHER_FORM: Final = re.compile(r"^(?:import|export)\b.*|\bimport(?:\.meta|\().*", re.MULTILINE)


def joined(entry: str, modules: Mapping[str, str]) -> str:
    """``entry`` and all that it imports, directly or not, in the order in which a browser evaluates them.

    Args:
        modules: texts by name, without ``.js``.

    Raises:
        ValueError: the form of an import or export is not known here, modules import each other, or one is not there.
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
    # Nothing imports a page's own module, so it needs no scope, and may wait at its top.
    texts[name] = (
        f"const ${name} = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();\n" if importers else body
    )


def _without_imports(name: str, text: str) -> tuple[str, str]:
    """A module's text, its imports taken from objects, and the names that it exports."""
    exported = ", ".join(_EXPORT.findall(text))
    body = _EXPORT.sub("", _IMPORT.sub(r"const { \1 } = $\2;", text)).rstrip()
    if other := _OTHER_FORM.search(body):
        raise ValueError(f"{name}.js: this form of import or export is not understood: {other[0]}")
    return body, exported
