"""Jobs in a few threads, with no more bytes in flight than a budget."""

import concurrent.futures
from collections.abc import Callable, Iterable

WORKERS = 3
BYTES_IN_FLIGHT = 768 << 20


def run_bounded(jobs: Iterable[tuple[int, Callable[[], None]]]) -> None:
    """Runs (size in bytes, function) jobs; one larger than the budget runs alone. The first error is raised.

    Reading, transposing and writing of different tensors overlap; NumPy and the operating system let go of Python's
    lock for all three.
    """
    waiting: dict[concurrent.futures.Future[None], int] = {}

    def settle(budget: int) -> None:
        while waiting and sum(waiting.values()) > budget:
            done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                del waiting[future]
                future.result()

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        try:
            for size, job in jobs:
                settle(max(0, BYTES_IN_FLIGHT - size))
                waiting[pool.submit(job)] = size
            settle(0)
        finally:
            pool.shutdown(cancel_futures=True)
