"""Parses pages of the built site: their links, their shell blocks."""

from html.parser import HTMLParser


class BuiltPage(HTMLParser):
    """A page as its reader has it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        """Targets of links to other files of the site, as they are written, without the fragment."""
        self.shell_blocks: list[str] = []
        self._divs: list[bool] = []
        """For each open ``div``, whether it is a shell block."""
        self._is_code = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        target, _, _ = (attributes.get("href") or "").partition("#")
        if tag == "a" and target and "://" not in target:
            self.links.append(target)
        if tag == "div":
            self._divs.append("language-sh" in (attributes.get("class") or "").split())
        if tag == "code" and any(self._divs):
            self._is_code = True
            self.shell_blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._divs:
            self._divs.pop()
        if tag == "code":
            self._is_code = False

    def handle_data(self, data: str) -> None:
        if self._is_code:
            self.shell_blocks[-1] += data
