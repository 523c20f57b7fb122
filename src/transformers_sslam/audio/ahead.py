"""Work done ahead in threads: decoders, resampler and log-mels run outside Python's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar


Item = TypeVar("Item")
Result = TypeVar("Result")

TASKS_AHEAD = 2  # of each thread


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Future[Result]]:
    """`function` of each item, in their order, by a thread for each core and one more. `Executor.map` would take all items at once."""
    threads = min(32, (os.cpu_count() or 1) + 1)
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) >= TASKS_AHEAD * threads:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()


def in_background(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made in the background while the one before is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as background:
        upcoming: Future = background.submit(next, iterator, end)
        while (item := upcoming.result()) is not end:
            upcoming = background.submit(next, iterator, end)
            yield item
