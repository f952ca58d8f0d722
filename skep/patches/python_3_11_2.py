"""Fixes two bugs in the asyncio of Debian 12 (Python 3.11.2).  Python 3.11.7 has both fixes.

* A deadline within the clean-up of a cancelled task raised CancelledError instead of TimeoutError.  The clean-up then
  ended instead of skipping the late step (https://github.com/python/cpython/issues/102780).
* ``abort`` of a TLS connection that was already closed raised AttributeError.
"""

import asyncio
from asyncio import sslproto
from types import TracebackType
from typing import Any

_Transport: Any = sslproto._SSLProtocolTransport
_original_enter, _original_exit = asyncio.Timeout.__aenter__, asyncio.Timeout.__aexit__
_original_abort = _Transport.abort


async def _enter(self: Any) -> asyncio.Timeout:
    timeout = await _original_enter(self)
    self.cancelled_before = self._task.cancelling()
    return timeout


async def _exit(
    self: Any, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
) -> None:
    await _original_exit(self, kind, error, traceback)  # it has withdrawn its own cancellation
    is_own = self.expired() and self._task.cancelling() <= self.cancelled_before
    if is_own and kind is asyncio.CancelledError:
        raise TimeoutError from error


def _abort(self: Any) -> None:
    if self._ssl_protocol is not None:
        _original_abort(self)


def install() -> None:
    """Apply the fixes.  On an asyncio that has them already, nothing changes."""
    for name, method in (("__aenter__", _enter), ("__aexit__", _exit)):
        setattr(asyncio.Timeout, name, method)
    _Transport.abort = _abort
