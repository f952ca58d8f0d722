"""The picture of ``skep top`` in the guide.  ``python -m tests.support.clients.top_screen`` writes it."""

import asyncio
import re
from pathlib import Path

from skep.top.app import TopApp
from tests.support.clients.top_clusters import StillCluster, a_shop

PICTURE = Path(__file__).parents[3] / "docs/guide/skep-top.svg"
PAINTED = ("1.5&#160;CPUs", "Roll&#160;back")
"""Texts in the last row of the table and in the key bar, which are painted last."""
_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


async def picture() -> str:
    """Return the first screen, without fonts from another site that a reader's browser would fetch."""
    app = TopApp(StillCluster(a_shop()))
    async with app.run_test(size=(114, 17)) as pilot:
        before, present = "", app.export_screenshot(title="skep top")
        while not all(text in present for text in PAINTED) or present != before:
            await pilot.pause(0.05)
            before, present = present, app.export_screenshot(title="skep top")
        return _FONTS.sub("", present)


if __name__ == "__main__":
    PICTURE.write_text(asyncio.run(picture()))
