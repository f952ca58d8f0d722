"""Runs nftables commands through libnftables: text in, one transaction, no subprocess.

Several threads may call it at once, each in its network namespace.  This saves time, because changes mostly wait in the
kernel.  But libnftables has one list of interface names for the whole process, without a lock, and empties it whenever
a context is freed.  So commands that may read the list run alone.  These are ``list`` commands, which print the rules
of all programs (except ``list set``), and texts with ``iif`` or ``oif``.  Our own rules use ``iifname`` and
``oifname``, which do not read it.

Source: nftables 1.0.6, src/iface.c.
"""

import ctypes
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Condition

from skep.dataplane.netns import nft_table
from skep.dataplane.netns.nft_table import NftTable
from skep.errors import SkepError
from skep.linux import descriptors

_DESCRIPTORS_MAX = descriptors.SELECT_MAX - 64
"""Highest descriptor number with which libnftables is called.

A socket numbered above ``SELECT_MAX`` would crash the process.  The difference is for descriptors that other threads
open at the same time.
"""


class NftFailed(SkepError):
    """The kernel or the parser refused the commands.  The message is from libnftables."""


class NftUnavailable(NftFailed):
    """The command was not run: this process has no descriptor or memory left for libnftables."""


def run(text: str) -> str:
    """Apply ``text`` in the calling thread's network namespace, all of it or nothing.

    Return its output (of ``list`` commands).  Blocks.  Raises: NftFailed.
    """
    with _LOCK.alone() if _LOOKS_UP_INTERFACES.search(text) else _LOCK.shared():
        return _run(text)


_LOOKS_UP_INTERFACES = re.compile(r"\b[io]if\b|\blist (?!set\b)")


class SharedLock:
    """A lock that either many threads share or one thread holds alone.

    A waiting ``alone`` comes before later ``shared``.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._sharing = 0
        self._waiting = 0
        self._is_alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with others.  Blocks."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_alone and not self._waiting)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock alone.  Blocks."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._is_alone and not self._sharing)
            self._waiting -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._changed.notify_all()


_LOCK = SharedLock()


def _run(text: str) -> str:
    library = _library()
    if (descriptor := descriptors.lowest_free()) >= _DESCRIPTORS_MAX:
        raise NftUnavailable(
            f"too many open files for libnftables: the next one would have the number {descriptor}"
        )
    context = library.nft_ctx_new(0)
    if not context:
        raise NftUnavailable("libnftables returned no context")
    try:
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_buffer_output(context)
        if library.nft_run_cmd_from_buffer(context, text.encode()):
            raise NftFailed(library.nft_ctx_get_error_buffer(context).decode(errors="replace").strip())
        output: bytes = library.nft_ctx_get_output_buffer(context)
        return output.decode(errors="replace")
    finally:
        library.nft_ctx_free(context)


def create(tables: Sequence[NftTable], stale: Iterable[str] = ()) -> None:
    """Create tables in the calling thread's namespace, replacing earlier ones, and remove the ``stale`` tables.

    Tries first without a removal, which is faster, because usually no earlier tables exist.  Blocks.  Raises:
    NftFailed.
    """
    try:
        run("".join(map(nft_table.fresh, tables)))
    except NftFailed:  # tables of an earlier process exist
        run("".join(map(nft_table.absent, stale)) + "".join(map(nft_table.whole, tables)))


def in_any_order(listing: str) -> list[str]:
    """Return the words of a listing, sorted, because the order of elements and chains in listings varies."""
    return sorted(listing.replace(",", " ").split())


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libnftables.so.1")
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    for name in ("nft_ctx_get_error_buffer", "nft_ctx_get_output_buffer"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    for name in ("nft_ctx_buffer_error", "nft_ctx_buffer_output", "nft_ctx_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library
