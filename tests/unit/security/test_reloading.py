"""A server takes over a renewed certificate without a restart."""

import asyncio

from skep.security import keypair
from skep.security.reloading import follow_key_pair
from tests.unit.security.test_keypair import a_pair


class Steps:
    """A clock whose time passes when the test says so."""

    def __init__(self) -> None:
        self.slept = asyncio.Semaphore(0)
        self.waiting = asyncio.Event()

    def now_ns(self) -> int:
        return 0

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        self.waiting.set()
        await self.slept.acquire()

    async def step(self) -> None:
        await self.waiting.wait()
        self.waiting.clear()
        self.slept.release()
        await self.waiting.wait()


class Replaced:
    def __init__(self) -> None:
        self.pairs = []

    def replace(self, pair) -> None:
        self.pairs.append(pair.certificate_pem)


async def test_a_renewed_certificate_is_taken_over_once(tmp_path):
    keypair.save(a_pair(), tmp_path)
    clock, tls = Steps(), Replaced()
    following = asyncio.create_task(follow_key_pair(tls, tmp_path, clock))
    try:
        await clock.step()
        assert tls.pairs == []
        renewed = a_pair()
        keypair.save(renewed, tmp_path)
        await clock.step()
        await clock.step()
        assert tls.pairs == [renewed.certificate_pem]
        (tmp_path / keypair.KEY_FILE).write_bytes(b"damaged")
        await clock.step()
        assert tls.pairs == [renewed.certificate_pem]
    finally:
        following.cancel()
