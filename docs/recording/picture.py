"""Draws a recording as an animated SVG, which loads nothing and runs no script.

A row that does not change is one text with the time in which it is visible, so the file stays small.  Viewers that
do not animate, and readers who asked for reduced motion, see the last screen.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from docs.recording.terminal import Row, Run

CELL_WIDTH, LINE_HEIGHT, FONT_SIZE, MARGIN, BAR = 8.4, 19, 14, 16, 34
_COLORS = {
    "red": "#ff8b81",
    "green": "#8ad4a1",
    "yellow": "#f0b429",
    "blue": "#8ab4f8",
    "cyan": "#7fd1d8",
    "dim": "#a09684",
}
_STYLE = f"""
  text {{ font: {FONT_SIZE}px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
         fill: #ece4d6; white-space: pre; }}
  .b {{ font-weight: bold; fill: #fff8e7; }}
"""


class Screen(NamedTuple):
    """The rows of a terminal, from a moment on."""

    at: float
    rows: Sequence[Row]


class Shown(NamedTuple):
    """A row, and the time in which it is visible."""

    number: int
    row: Row
    start: float
    end: float


def draw(screens: Sequence[Screen], title: str, *, columns: int, end: float) -> str:
    """Return the recording, which starts again at ``end`` seconds."""
    height = len(screens[0].rows)
    width = round(2 * MARGIN + columns * CELL_WIDTH)
    total = round(BAR + height * LINE_HEIGHT + MARGIN)
    texts = shown_rows(screens, end)
    styles, drawn = [_STYLE.strip("\n")], list[str]()
    for color, value in _COLORS.items():
        styles.append(f"  .{color} {{ fill: {value}; }}")
    times = sorted({(text.start, text.end) for text in texts})
    names = {one: f"t{number}" for number, one in enumerate(times)}
    drawn += [_row(text, names[text.start, text.end]) for text in texts]
    ended = ", ".join(f".{names[one]}" for one in times if one[1] < end)
    styles.append(f"  {ended} {{ opacity: 0 }}" if ended else "")
    animated = [_animation(names[one], *one, end) for one in times]
    styles.append("  @media (prefers-reduced-motion: no-preference) {")
    styles += [*animated, "  }"]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img">',
            f"<title>{escape(title)}</title>",
            "<style>",
            *styles,
            "</style>",
            f'<rect width="{width}" height="{total}" rx="8" fill="#241d13"/>',
            *(
                f'<circle cx="{MARGIN + 6 + 20 * number}" cy="17" r="6" fill="{color}"/>'
                for number, color in enumerate(("#b9770e", "#e8a317", "#f6d58b"))
            ),
            *drawn,
            "</svg>",
            "",
        ]
    )


def shown_rows(screens: Sequence[Screen], end: float) -> list[Shown]:
    """Return every content of every row once for each time in which it is visible."""
    found = list[Shown]()
    for number in range(len(screens[0].rows)):
        row, start = screens[0].rows[number], screens[0].at
        for screen in [*screens[1:], Screen(end, [()] * len(screens[0].rows))]:
            if screen.rows[number] != row:
                if row:
                    found.append(Shown(number, row, start, screen.at))
                row, start = screen.rows[number], screen.at
    return found


def _animation(name: str, start: float, until: float, end: float) -> str:
    """Return the rule that shows texts of a class from ``start`` to ``until``."""
    a, b = (f"{100 * moment / end:.2f}%" for moment in (start, until))
    steps = [f"{a} {{ opacity: 1 }}"]
    if start > 0:
        steps.insert(0, "0% { opacity: 0 }")
    if until < end:
        steps.append(f"{b}, 100% {{ opacity: 0 }}")
    return (
        f"  .{name} {{ opacity: 0; animation: {name} {end:g}s step-end infinite; }}"
        f" @keyframes {name} {{ {' '.join(steps)} }}"
    )


def _row(shown: Shown, name: str) -> str:
    """Return a row.  Each run has its place and width, whatever the reader's font is."""
    y = BAR + shown.number * LINE_HEIGHT + FONT_SIZE
    runs = "".join(_run(run, y) for run in shown.row)
    return f'<g class="{name}">{runs}</g>'


def _run(run: Run, y: int) -> str:
    names = " ".join(name for name in ("b" if run.style.is_bold else "", run.style.color) if name)
    kind = f' class="{names}"' if names else ""
    x, width = MARGIN + run.column * CELL_WIDTH, len(run.text) * CELL_WIDTH
    return f'<text x="{x:.1f}" y="{y}" textLength="{width:.1f}"{kind}>{escape(run.text, quote=False)}</text>'
