"""Asyncio building blocks, independent of clusters."""

import sys

if sys.version_info < (3, 11, 7):
    from skep.patches import python_3_11_2

    python_3_11_2.install()
