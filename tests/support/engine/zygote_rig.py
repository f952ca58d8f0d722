"""A zygote for a test, which acts as its node process."""

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType

from skep.node.supervision.zygote import Children, Entry, Preparation, Zygote, serve


class StartedZygote(Zygote):
    """The test's end of a zygote."""

    def __init__(self, connection: socket.socket, pid: int, held: int) -> None:
        super().__init__(connection)
        self.pid = pid
        self._held = held

    def end(self) -> None:
        """Release the zygote and wait for its end.  Its forked processes continue."""
        self.close()
        os.close(self._held)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def start(
    entries: Mapping[str, Entry], preparations: Mapping[str, Preparation] = MappingProxyType({})
) -> StartedZygote:
    """Fork a zygote.  It ends when the test releases it, or ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os.close(held)
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            serve(theirs, Children(entries, preparations), ended)
        finally:
            os._exit(0)
    theirs.close()
    os.close(ended)
    return StartedZygote(ours, pid, held)
