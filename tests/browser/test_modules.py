"""The dashboard's modules without a page: ``tests/browser/modules/*.test.js`` in Node's own test runner."""

import re
import subprocess
from pathlib import Path

from tests.support.browser import NODE

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


def test_every_module_is_asked_for_by_the_first_page() -> None:
    """One after the other, as each names the next ones, they take several round trips."""
    found, due = set[str](), {"app.js"}
    while due:
        text = (STATIC / due.pop()).read_text()
        named = set(re.findall(r'from "\./([a-z_]+\.js)"', text)) - found
        found |= named
        due |= named
    index = (STATIC / "index.html").read_text()
    assert set(re.findall(r'rel="modulepreload" href="([^"]+)"', index)) == found


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
