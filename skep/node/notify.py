"""Service state for systemd (sd_notify)."""

import os
import socket


def notify(state: str) -> None:
    """Send ``READY=1``, ``RELOADING=1`` or ``STOPPING=1`` to ``$NOTIFY_SOCKET``; nothing without one.

    Source: systemd, sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
        try:
            line.sendto(state.encode(), address)
        except OSError:
            pass  # systemd does not listen any more; the service does not depend on it
