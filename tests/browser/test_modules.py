"""The dashboard's modules without a page: ``tests/browser/modules/*.test.js`` in Node's own test runner."""

import re
import subprocess
from pathlib import Path

import pytest

from skep.dashboard.pages import joined, pages
from tests.support.clients.browser import NODE

HERE = Path(__file__).parent
STATIC = HERE.parents[1] / "skep" / "dashboard" / "static"
PARSES_HTML = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc"
    r"|\beval\b|new Function|javascript:"
)


def test_the_modules_decide_as_they_should() -> None:
    tests = sorted(str(path) for path in (HERE / "modules").glob("*.test.js"))
    done = subprocess.run([NODE, "--test", *tests], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search(r"pass [1-9]\d", done.stdout)


def test_the_first_screen_needs_one_script(tmp_path: Path) -> None:
    """One request for each module, in turn as each names the next ones, takes longer than all that follows."""
    index = (STATIC / "index.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]+\.js)"', index) == ["app.js"]
    for entry in ("app.js", "login.js"):
        script = tmp_path / entry.replace(".js", ".mjs")
        script.write_bytes(pages()[entry].content)
        assert not re.search(r"^(import|export)\b", script.read_text(), re.MULTILINE)
        done = subprocess.run(
            [NODE, "--check", script], capture_output=True, text=True, timeout=50, check=False
        )
        assert done.returncode == 0, done.stderr
    assert {name for name in pages() if name.endswith(".js")} == {"app.js", "login.js"}


def test_a_joined_script_is_its_modules(tmp_path: Path) -> None:
    """What modules export, when they are evaluated, and whose a name is that two of them have."""
    modules = {
        "app": 'import { size, grown } from "./shape.js";\nimport { log } from "./log.js";\n'
        'const name = "app";\nlog(`${name} ${size} ${grown(2)}`);\n',
        "shape": 'import { log } from "./log.js";\nconst name = "shape";\nexport const size = 3;\n'
        "export function grown(by) {\n  return size * by;\n}\nlog(name);\n",
        "log": "const lines = [];\nexport const log = (line) => lines.push(line);\n"
        'export class Log {}\nglobalThis.shown = () => lines.join(", ");\n',
        "unused": "throw new Error();\n",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.js").write_text(text)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "joined.js").write_text(joined("app", modules))
    printed = [
        subprocess.run(
            [
                NODE,
                "--input-type=module",
                "--eval",
                f'await import("{tmp_path}/{file}.js"); console.log(shown());',
            ],
            capture_output=True,
            text=True,
            timeout=50,
            check=True,
        ).stdout
        for file in ("app", "joined")
    ]
    assert printed == ["shape, app 3 6\n"] * 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('import * as all from "./b.js";\n', "not understood"),
        ('import { one as two } from "./b.js";\n', "not understood"),
        ('import {\n  one,\n} from "./b.js";\n', "not understood"),
        ('export { one } from "./b.js";\n', "not understood"),
        ("export default 1;\n", "not understood"),
        ('const b = await import("./b.js");\n', "not understood"),
        ('import { one } from "./missing.js";\n', "not there"),
        ('import { one } from "./b.js";\n', "import each other: a b a"),
    ],
)
def test_what_cannot_be_joined_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        joined("a", {"a": text, "b": 'import { one } from "./a.js";\n'})


def test_nothing_is_ever_parsed_as_html() -> None:
    found = [
        f"{path.name}:{number} {line.strip()}"
        for path in STATIC.glob("*.js")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PARSES_HTML.search(line)
    ]
    assert found == []


def test_pages_use_relative_addresses_and_nothing_inline() -> None:
    """They are below a path that they do not know, under a policy that refuses inline code and other origins."""
    index = (STATIC / "index.html").read_text()
    inline = r"<script>|<style|style=|\son\w+="
    assert not re.search(inline + r"|(src|href)=\"(/|https?:)", index)
    assert not re.search(inline + r"|(src|href)=\"(//|https?:)", (STATIC / "login.html").read_text())
    for path in STATIC.glob("*.js"):
        assert not re.search(
            r"(fetch|EventSource|WebSocket|import)\(?\s*[\"'`](/|https?:|wss?:)", path.read_text()
        )
