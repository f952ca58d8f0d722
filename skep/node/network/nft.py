"""nftables through libnftables: text in, one transaction, no subprocess."""

import ctypes
from functools import cache

from skep.errors import SkepError
from skep.linux import descriptors

_DESCRIPTORS_MAX = descriptors.SELECT_MAX - 64
"""A socket beyond ``SELECT_MAX`` would end the process; other threads may open some at the same time."""


class NftFailed(SkepError):
    """The kernel or the parser refused; the message is libnftables' own."""


def run(text: str) -> str:
    """Apply ``text`` in the network namespace of the calling thread, all of it or nothing.

    Gives what it printed (``list`` commands).  Raises: NftFailed.
    """
    library = _library()
    if (descriptor := descriptors.lowest_free()) >= _DESCRIPTORS_MAX:
        raise NftFailed(
            f"too many open files for libnftables: the next one would have the number {descriptor}"
        )
    context = library.nft_ctx_new(0)
    if not context:
        raise NftFailed("libnftables gave no context")
    try:
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_buffer_output(context)
        if library.nft_run_cmd_from_buffer(context, text.encode()):
            raise NftFailed(library.nft_ctx_get_error_buffer(context).decode(errors="replace").strip())
        output: bytes = library.nft_ctx_get_output_buffer(context)
        return output.decode(errors="replace")
    finally:
        library.nft_ctx_free(context)


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
