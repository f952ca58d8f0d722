"""A client that sends API requests all the time, and functions that summarize its latencies and the manager's loop
lag.
"""

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.engine import Engine, EngineError

PAUSE_S = 0.02
"""Seconds between two requests."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` (0 to 1) of the values do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def lag_ms(bounds_ms: Sequence[int], counts: Sequence[int], share: float = 0.999) -> float:
    """Return the lag that this share of samples does not exceed, rounded up to a bound, or infinity beyond all
    bounds.
    """
    needed, reached = math.ceil(share * sum(counts)), 0
    for bound, count in zip((*bounds_ms, math.inf), counts, strict=True):
        reached += count
        if reached >= needed:
            return bound
    raise ValueError("there are more counts than bounds")


class Probe:
    """One client with one connection that lists, reads, creates, updates and removes services."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._created = 0
        self.failures: list[str] = []
        """Unexpected responses.  Their durations are included in the latencies."""
        self._requests_ms: dict[str, list[float]] = {}

    @asynccontextmanager
    async def asking(self, requests_ms: dict[str, list[float]]) -> AsyncIterator[None]:
        """Send requests while the context is open.  Every latency is added to ``requests_ms``, by request."""
        over = threading.Event()
        self._requests_ms = requests_ms
        asking = asyncio.create_task(asyncio.to_thread(self._ask, over))
        try:
            yield
        finally:
            over.set()
            await asking

    def _ask(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                self._ask_all()
            except EngineError as error:
                self.failures.append(str(error))

    def _ask_all(self) -> None:
        self._created += 1
        name = f"asked{self._created}"
        spec = {
            "Name": name,
            "TaskTemplate": {"ContainerSpec": {"Image": "busybox:1"}},
            "Mode": {"Replicated": {"Replicas": 1}},
        }
        self._timed("GET /nodes", "GET", "/nodes")
        self._timed("GET /services", "GET", "/services")
        id = self._timed("POST /services/create", "POST", "/services/create", spec)["ID"]
        version = self._timed("GET /services/{id}", "GET", f"/services/{id}")["Version"]["Index"]
        labeled = {**spec, "Labels": {"updated": "1"}}
        self._timed("POST /services/{id}/update", "POST", f"/services/{id}/update?version={version}", labeled)
        self._timed("DELETE /services/{id}", "DELETE", f"/services/{id}")

    def _timed(self, name: str, method: str, path: str, body: Any = None) -> Any:
        """Send one request.  Its response is decoded after the clock has stopped."""
        encoded = None if body is None else json.dumps(body).encode()
        began = time.perf_counter()
        try:
            data = self._engine.raw(method, path, encoded)
        finally:
            self._requests_ms.setdefault(name, []).append((time.perf_counter() - began) * 1000)
            time.sleep(PAUSE_S)
        return json.loads(data) if data.strip() and not name.endswith("s") else None
