"""A function over many items in several processes or threads, the results in order.

Threads are for a function that lets go of Python's lock nearly all the time: nothing is copied between processes then.
Processes are forked, so that a tokenizer is loaded once.
"""

import ctypes
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Generic, TypeVar

from llmpipe.errors import UserError

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
_function: Callable[[Any], Any]


class Workers(Generic[T]):
    """`count` processes or threads that call a function; one is this process itself. They start with the first item."""

    def __init__(self, function: Callable[[Any], T], count: int, threads: bool = False):
        self.function, self.count, self.threads = function, count, threads

    def __enter__(self) -> "Workers[T]":
        if self.count > 1 and self.threads:
            self._pool, self._call = ThreadPoolExecutor(self.count), self.function
        elif self.count > 1:
            context = multiprocessing.get_context("fork")
            self._pool, self._call = ProcessPoolExecutor(self.count, context, _start, (self.function,)), _call
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.count > 1:
            self._pool.shutdown(cancel_futures=True)

    def in_order(self, items: Iterable[Any]) -> Iterator[T]:
        """`map(function, items)`; of the items at most two for each worker are held."""
        if self.count == 1:
            yield from map(self.function, items)
            return
        waiting: deque[Future[T]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(self._call, item))
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed: if the machine's memory was full, run this again with fewer --workers"
            ) from error


def _start(function: Callable[[Any], Any]) -> None:
    """In a worker: it ends with its parent, also with one that is killed; Ctrl-C is the parent's to answer."""
    global _function
    _function = function
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(item: Any) -> Any:
    return _function(item)
