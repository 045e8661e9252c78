"""A function over many items in several processes, the results in order.

Processes, not threads: parsing JSON holds Python's lock. They are forked, so that a tokenizer is loaded once.
"""

import ctypes
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from llmpipe.errors import UserError

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
_function: Callable[[Any], Any]


def in_order(function: Callable[[Any], T], items: Iterable[Any], workers: int) -> Iterator[T]:
    """`map(function, items)`; with more than one worker in processes, which hold two items each at most."""
    if workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start, (function,))
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed: if the machine's memory was full, run this again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    """In a worker: it ends with its parent, also with one that is killed; Ctrl-C is the parent's to answer."""
    global _function
    _function = function
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(item: Any) -> Any:
    return _function(item)
