"""First words of the reason why a task is still on its drained node, by which commands recognize it."""

from typing import Final

STAYS: Final = "it stays on"
