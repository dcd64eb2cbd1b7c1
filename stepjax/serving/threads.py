"""Threads for what would hold up the event loop: large JSON, images, tokens."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Threads:
    def __init__(self, count: int, name: str):
        self.executor = ThreadPoolExecutor(count, thread_name_prefix=name)  # threads start when they are needed

    async def run(self, function: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *args)

    def close(self) -> None:
        """What has not begun is given up; nobody is waited for."""
        self.executor.shutdown(wait=False, cancel_futures=True)
