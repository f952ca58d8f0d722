"""The README's recording: the terminal that it reads, and the picture that is drawn of it."""

import re
import xml.etree.ElementTree as ET
from html import escape

from docs.recording.__main__ import PICTURE, SCRIPT
from docs.recording.picture import Screen, draw, shown_rows
from docs.recording.terminal import Style, Terminal

BYTES_MAX = 60_000
"""Visitors of the README load the picture."""


def written(*texts: str, columns: int = 12, rows: int = 3) -> list[str]:
    """The rows of a terminal, as texts."""
    terminal = Terminal(columns, rows)
    for text in texts:
        terminal.write(text)
    return ["".join(" " * run.column + run.text for run in row[:1]) for row in terminal.rows()]


def test_lines_follow_each_other_and_scroll() -> None:
    assert written("a\r\nb\r\nc\r\nd") == ["b", "c", "d"]


def test_a_long_line_continues_in_the_next_row() -> None:
    assert written("abcdefgh", columns=5) == ["abcde", "fgh", ""]


def test_progress_replaces_the_rows_above() -> None:
    """As docker prints it: up, erase the row, write, down."""
    assert written("1/2: new\r\n2/2: new\r\n", "\x1b[2A\x1b[2K\r1/2: runs\r\x1b[2B") == [
        "1/2: runs",
        "2/2: new",
        "",
    ]


def test_colors_and_bold_belong_to_their_words() -> None:
    terminal = Terminal(40, 1)
    terminal.write("\x1b[1mweb\x1b[0m is \x1b[31mdegraded\x1b[39m now")
    (row,) = terminal.rows()
    assert [(run.text, run.style) for run in row] == [
        ("web", Style(is_bold=True)),
        ("is", Style()),
        ("degraded", Style(color="red")),
        ("now", Style()),
    ]
    assert [run.column for run in row] == [0, 4, 7, 16]


def test_a_row_is_drawn_once_for_the_time_in_which_it_stays() -> None:
    terminal, screens = Terminal(10, 2), []
    for at, text in ((0.0, "a\r\n"), (1.0, "b"), (2.0, "\rc")):
        terminal.write(text)
        screens.append(Screen(at, terminal.rows()))
    found = [(one.row[0].text, one.start, one.end) for one in shown_rows(screens, 5.0)]
    assert found == [("a", 0.0, 5.0), ("b", 1.0, 2.0), ("c", 2.0, 5.0)]


def test_readers_without_motion_see_the_last_screen() -> None:
    terminal, screens = Terminal(10, 1), []
    for at, text in ((0.0, "first"), (1.0, "\r\x1b[2Klast")):
        terminal.write(text)
        screens.append(Screen(at, terminal.rows()))
    drawn = draw(screens, "Title", columns=10, end=2.0)
    before_motion = drawn.partition("@media")[0]
    (ended,) = re.findall(r"^  (\.t\d) \{ opacity: 0 \}$", before_motion, re.MULTILINE)
    (first,) = re.findall(r'<g class="(t\d)"><text [^>]*>first', drawn)
    assert ended == f".{first}"


def test_the_picture_shows_every_command_and_loads_nothing() -> None:
    picture = PICTURE.read_text()
    ET.fromstring(picture)
    texts = [text for text in ET.fromstring(picture).itertext() if text.strip()]
    assert [step.command for step in SCRIPT if not any(step.command in text for text in texts)] == []
    assert len(picture) < BYTES_MAX
    assert re.findall(r"href|url\(|@import|<script|<image", picture) == []
    assert escape("web scaled to 12") in picture
