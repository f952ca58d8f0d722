"""The forwarder's thread ends by a mistake of ours: that is not to go unnoticed."""

import os
import socket
import time

import pytest

from skep.dataplane.encrypted.forwarder import Forwarder
from skep.dataplane.encrypted.plan import Plan
from skep.dataplane.encrypted.receiving import Receiver

WAIT_S = 5.0


def tick_for(forwarder: Forwarder, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        forwarder.tick()


def test_a_carrying_thread_that_dies_ends_the_forwarder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Receiver) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(Receiver, "turn", fail)
    forwarder = Forwarder(os.urandom, lambda: 0.5, time.monotonic)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 0))
        free = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        try:
            forwarder.apply(Plan(address="127.0.0.1", port=port))
            forwarder.tick()
            sender.sendto(b"hello", ("127.0.0.1", port))
            with pytest.raises(RuntimeError, match="carrying thread") as raised:
                tick_for(forwarder, WAIT_S)
            assert isinstance(raised.value.__cause__, ZeroDivisionError)
        finally:
            forwarder.close()
