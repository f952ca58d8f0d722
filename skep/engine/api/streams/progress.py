"""Streamed responses: one JSON message per line."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable

from aiohttp import web

from skep.aio.failures import describe_error, log_error
from skep.api.http.server import JsonLines
from skep.engine.build.interface import StepFailed
from skep.engine.images.progress import ProgressMessage, Report, failure
from skep.errors import SkepError, Unavailable

_PENDING_MAX = 1000
"""Limit for queued messages without text."""
_TEXT_BYTES_MAX = 16 << 20
"""Limit in bytes for queued text, which a build may write faster than its client reads."""
_MESSAGE_BYTES = 256
"""Estimated bytes that a message occupies in addition to its text."""
_LAST_MAX = 32
"""Number of texts that are kept after the limit.  The last ones have the reason of a failure, or the built image."""
_CLIPPED = ProgressMessage(stream="\n[output clipped: it comes faster than the client takes it]\n")


class PendingMessages:
    """Messages for a client that may be slower than the work.

    Of a layer's transfer, only the latest message is kept.  Beyond the limit, other messages are dropped (there are
    only a few per layer), except results (``aux``).  Text, such as the output of a build's commands, has a larger
    limit.  Beyond it, only the last texts are kept, after a note.
    """

    def __init__(self) -> None:
        self._messages: OrderedDict[object, ProgressMessage] = OrderedDict()
        self._changed = asyncio.Event()
        self._has_ended = False
        self._text_bytes = 0
        self._is_clipped = False
        self._last: deque[ProgressMessage] = deque(maxlen=_LAST_MAX)
        """The last texts since the output was clipped."""

    def report(self, message: ProgressMessage) -> None:
        """Queue a message without waiting."""
        is_transfer = message.progress_detail is not None and message.progress
        if message.stream:
            self._is_clipped |= self._text_bytes > _TEXT_BYTES_MAX
            if self._is_clipped:
                self._last.append(message)
                return
            self._text_bytes += len(message.stream) + _MESSAGE_BYTES
        key: object = (message.id, message.status) if is_transfer else object()
        is_kept = bool(message.stream) or message.aux is not None
        if key in self._messages or is_kept or len(self._messages) < _PENDING_MAX:
            self._messages[key] = message
        self._changed.set()

    def end(self) -> None:
        """Mark the end of the messages."""
        self._has_ended = True
        self._changed.set()

    async def next(self) -> ProgressMessage | None:
        """Return the oldest message, or None after the last."""
        while not self._messages:
            if self._is_clipped:
                self._is_clipped = False
                last, self._last = self._last, deque(maxlen=_LAST_MAX)
                for message in last:
                    self.report(message)
                return _CLIPPED
            if self._has_ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        message = self._messages.popitem(last=False)[1]
        if message.stream:
            self._text_bytes -= len(message.stream) + _MESSAGE_BYTES
        return message


async def respond_with_progress(
    request: web.Request, work: Callable[[Report], Awaitable[object]], *, early_errors: bool
) -> web.StreamResponse:
    """Run ``work`` and send its reports.  A client that disconnects stops it.

    Args:
        early_errors: Whether a failure before the first message becomes the response's status, as with
            ``docker pull``.  Otherwise it is always a message of a 200, as with ``docker load``.
    """
    pending = PendingMessages()
    lines = JsonLines(request)
    async with asyncio.TaskGroup() as group:
        outcome = group.create_task(_outcome(work, pending), name="image work")
        message = await pending.next()
        if message is not None or not early_errors or await outcome is None:
            async with lines:
                try:
                    while message is not None:
                        await lines.send(message)
                        message = await pending.next()
                    if (error := await outcome) is not None:
                        code = error.code if isinstance(error, StepFailed) else 0
                        await lines.send(failure(str(error), code))
                except ConnectionError:
                    outcome.cancel()
                return lines.response
    early = outcome.result()
    assert early is not None, "it ended without a message because it failed"
    raise early


async def _outcome(work: Callable[[Report], Awaitable[object]], pending: PendingMessages) -> SkepError | None:
    """Run ``work`` and return its expected failure, or None."""
    try:
        await work(pending.report)
    except SkepError as error:
        return error
    except ConnectionError:  # the client has disconnected
        raise
    except OSError as error:  # a file's error: after the first message the status cannot change
        log_error(error, "work with images failed")
        return Unavailable(describe_error(error))
    finally:
        pending.end()
    return None
