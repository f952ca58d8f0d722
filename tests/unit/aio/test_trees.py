"""Walks of directory trees have threads of their own."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skep.aio.trees import walk_tree
from skep.engine.images.archives.untar import tree_bytes


async def test_the_size_of_a_tree_is_counted_while_all_shared_threads_are_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    is_counted = threading.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(is_counted.wait))
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(20):
                assert await walk_tree(tree_bytes, str(tmp_path)) == 3
        finally:
            is_counted.set()
