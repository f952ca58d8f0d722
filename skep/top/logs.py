"""The logs of a service or a task, followed across reconnections."""

from collections.abc import AsyncGenerator, Callable, Mapping

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.client.client import ApiClient, ResponseStream
from skep.api.http.responses import OutputStream
from skep.errors import InvalidArgument, Unavailable
from skep.model.task_end import SEQUENCE
from skep.model.values.times import SECOND_NS, unix_ns

_TAIL = 200
"""Number of earlier lines that are shown first."""
_LINE_CHARACTERS_MAX = 2000
"""Longest line that is kept, in characters."""
_RECONNECT_S_MAX = 10.0
"""Longest delay in seconds before a reconnection."""
_CLOCKS_DIFFER_NS = 60 * SECOND_NS
"""Lines of the last minute are requested again after a reconnection, because the clock of a line's node may be behind
the clock of the node with the last line.  Clocks of a cluster differ by far less.
"""
_TASK = "com.docker.swarm.task.id="


class ShownLine(msgspec.Struct, frozen=True):
    """A log line.  ``task`` is the task's id, or empty for a line of Skep about the stream.  ``text`` is untrusted."""

    text: str
    task: str = ""
    stamp: str = ""
    is_error: bool = False


async def follow_logs(
    client: ApiClient, kind: str, id: str, clock: Clock, rng: Callable[[], float]
) -> AsyncGenerator[ShownLine, None]:
    """Yield the last lines, then new lines.  A lost connection is reported and resumed.

    Raises:
        SkepError: The request was refused, for example because the service was removed.
    """
    backoff = Backoff(0.5, _RECONNECT_S_MAX, rng=rng)
    tail, since = str(_TAIL), ""
    last: dict[str, int] = {}
    """Time of the last line of each task, by the clock of its node."""
    while True:
        shown = dict(last)
        try:
            is_terminal = await _has_terminal(client, kind, id)
            path = f"/{kind}s/{id}/logs"
            async with client.stream(
                path, stdout="1", stderr="1", follow="1", details="1", timestamps="1", tail=tail, since=since
            ) as stream:
                async for data, output in _outputs(stream, is_terminal):
                    for text in data.decode(errors="replace").splitlines():
                        line = line_of(text, output)
                        stamp_ns = _time_of(line)
                        if stamp_ns is not None:
                            last[line.task] = stamp_ns
                        backoff.reset()
                        if stamp_ns is None or stamp_ns > shown.get(line.task, -1):
                            yield line
            reason = "the stream ended"
        except Unavailable as error:
            reason = str(error)
        if last:
            tail, since = "all", _since(last)
        delay_s = backoff.next_delay_s()
        yield ShownLine(f"{reason}. Reconnecting in {delay_s:.1f} s.")
        await clock.sleep(delay_s)


async def _has_terminal(client: ApiClient, kind: str, id: str) -> bool:
    """Return whether the output is one stream without frames."""
    found = await client.get(f"/{kind}s/{id}")
    template = found["Spec"]["TaskTemplate"] if kind == "service" else found["Spec"]
    return bool((template.get("ContainerSpec") or {}).get("TTY"))


async def _outputs(
    stream: ResponseStream, is_terminal: bool
) -> AsyncGenerator[tuple[bytes, OutputStream], None]:
    if not is_terminal:
        async for output, data in stream.frames():
            yield data, output
        return
    kept = b""
    async for piece in stream.pieces():
        *lines, kept = (kept + piece).split(b"\n")
        kept = kept[-_LINE_CHARACTERS_MAX:]
        if lines:
            yield b"\n".join(lines), OutputStream.STDOUT


def line_of(text: str, output: OutputStream) -> ShownLine:
    """Parse a line with its time and details, as requested by ``docker service logs``."""
    if output is OutputStream.SYSTEM:
        return ShownLine(text[:_LINE_CHARACTERS_MAX], is_error=True)
    text = SEQUENCE.sub("", text)
    stamp, _, rest = text.partition(" ")
    details, blank, message = rest.partition(" ")
    if not blank or _TASK not in details:
        return ShownLine(text[:_LINE_CHARACTERS_MAX], is_error=output is OutputStream.STDERR)
    task = details.partition(_TASK)[2].partition(",")[0]
    return ShownLine(message[:_LINE_CHARACTERS_MAX], task, stamp, output is OutputStream.STDERR)


def _time_of(line: ShownLine) -> int | None:
    """Return the time of a line in Unix nanoseconds, or None if it has no valid one."""
    try:
        return unix_ns(line.stamp) if line.stamp else None
    except InvalidArgument:
        return None


def _since(last: Mapping[str, int]) -> str:
    """Return the time from which lines are requested again, as the API expects it.

    Args:
        last: Time of the last line of each task, in Unix nanoseconds.
    """
    begin = max(min(last.values()), max(last.values()) - _CLOCKS_DIFFER_NS)
    seconds, nanoseconds = divmod(begin, SECOND_NS)
    return f"{seconds}.{nanoseconds:09d}"
