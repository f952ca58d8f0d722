"""What asyncio of Python 3.11.2 has wrong, which is Debian 12's.  Python 3.11.7 has both mended.

* A deadline within the clean-up of a cancelled task raised CancelledError instead of TimeoutError, so that the clean-up
  ended where it should have gone on without what was late (https://github.com/python/cpython/issues/102780).
* ``abort`` of a TLS connection that was closed already raised AttributeError.
"""

import asyncio
from asyncio import sslproto
from types import TracebackType
from typing import Any

_Transport: Any = sslproto._SSLProtocolTransport
_enter, _exit, _abort = asyncio.Timeout.__aenter__, asyncio.Timeout.__aexit__, _Transport.abort


async def _entered(self: Any) -> asyncio.Timeout:
    entered = await _enter(self)
    self.cancelled_before = self._task.cancelling()
    return entered


async def _exited(
    self: Any, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
) -> None:
    await _exit(self, kind, error, traceback)  # it has taken back its own cancellation
    is_own = self.expired() and self._task.cancelling() <= self.cancelled_before
    if is_own and kind is asyncio.CancelledError:
        raise TimeoutError from error


def _aborted(self: Any) -> None:
    if self._ssl_protocol is not None:
        _abort(self)


def install() -> None:
    """Mend asyncio.  Doing it to one that needs no mending changes nothing."""
    for name, method in (("__aenter__", _entered), ("__aexit__", _exited)):
        setattr(asyncio.Timeout, name, method)
    _Transport.abort = _aborted
