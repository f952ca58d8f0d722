"""The logs of a service or a task, followed across reconnections."""

from collections.abc import AsyncGenerator, Callable

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
    while True:
        try:
            is_terminal = await _has_terminal(client, kind, id)
            path = f"/{kind}s/{id}/logs"
            async with client.stream(
                path, stdout="1", stderr="1", follow="1", details="1", timestamps="1", tail=tail, since=since
            ) as stream:
                async for data, output in _outputs(stream, is_terminal):
                    for text in data.decode(errors="replace").splitlines():
                        line = line_of(text, output)
                        if line.stamp and (after := _after(line.stamp)):
                            tail, since = "all", after
                        backoff.reset()
                        yield line
            reason = "the stream ended"
        except Unavailable as error:
            reason = str(error)
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


def _after(stamp: str) -> str:
    """Return the time after ``stamp`` as the API expects it, or an empty text for an invalid one."""
    try:
        seconds, nanoseconds = divmod(unix_ns(stamp) + 1, SECOND_NS)
    except InvalidArgument:
        return ""
    return f"{seconds}.{nanoseconds:09d}"
