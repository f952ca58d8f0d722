"""The stack that an object belongs to, which a label names.  Docker's commands write it."""

from collections.abc import Mapping
from typing import Final

STACK_LABEL: Final = "com.docker.stack.namespace"


def stack_of(labels: Mapping[str, str]) -> str:
    """Return the stack of an object with ``labels``, or an empty text."""
    return labels.get(STACK_LABEL, "")
