"""Solves on CUDA whose host never waits: a step captured once and replayed, and an end that is learnt of late; or a step that
the device itself repeats as long as the solve goes on.

A graph repeats what one step did, on the memory it did it on. Whether it serves another solve is asked of the call of func
that every solve begins with: the same operations with the same numbers on the same memory (`calls.py`) mean the same step.
No GPU has run this yet; what is captured and replayed is tested on the CPU with a stand-in for the graph.
"""

import gc
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..step_control import RUNNING

_LIMIT = 16  # steps that are kept captured, those used longest ago let go first
_REMEMBERED = 256  # solves that are known to have none
_EXPECTED_SHARE = 10  # a solve may take a tenth less steps than the last one did
_IN_VAIN_SHARE = 8  # an eighth of the steps may be made past the end
_FEW_ROWS = 4096  # 32 KiB, copied in less time than a kernel takes to start
_STEPS_A_LAUNCH = 256  # where the device repeats a step; an interrupt is seen between two launches
MODES = ("step", "loop")


class Fence:
    """What the current stream of a device has been given so far. Nothing is behind on a CPU."""

    def __init__(self, device: torch.device):
        self._device, self._event = device, None
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()

    def pass_(self) -> None:
        """The stream that is current now goes on once that is done."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        """The host goes on once that is done."""
        if self._event is not None:
            self._event.synchronize()


class Graphs:
    """Solvers whose step is captured, by what the step does. One that is in use is not in here.

    Each comes with a fence behind its last use: the next may be on another stream.
    """

    def __init__(self, limit: int = _LIMIT):
        self.limit = limit
        self._kept: OrderedDict[Hashable, list[tuple[Any, Fence]]] = OrderedDict()
        self._lock = threading.Lock()
        self._marks: OrderedDict[Hashable, str] = OrderedDict()
        self._returned: deque[tuple[Hashable, Any, Fence]] = deque()

    def take(self, key: Hashable) -> Any:
        """One for this thread alone, or None."""
        self._take_back()
        with self._lock:
            found = self._kept.get(key)
            if not found:
                return None
            solver, fence = found.pop()
            if not found:
                del self._kept[key]
        fence.pass_()
        return solver

    def give_from_anywhere(self, key: Hashable, solver: Any, fence: Fence) -> None:
        """For `__del__`, which may run in the midst of whatever a thread does, under the lock too."""
        self._returned.append((key, solver, fence))

    def _take_back(self) -> None:
        while self._returned:
            with suppress(IndexError):  # another thread was faster
                self.give(*self._returned.popleft())

    def give(self, key: Hashable, solver: Any, fence: Fence) -> None:
        gone = []
        with self._lock:
            self._kept.setdefault(key, []).append((solver, fence))
            self._kept.move_to_end(key)
            while sum(map(len, self._kept.values())) > self.limit:
                oldest = next(iter(self._kept))
                gone.append(self._kept[oldest].pop(0))
                if not self._kept[oldest]:
                    del self._kept[oldest]
        for _, last in gone:
            last.wait()  # then its memory may go

    def mark(self, key: Hashable) -> str:
        """What is known of a solve: "", MET or NEVER."""
        with self._lock:
            return self._marks.get(key, "")

    def set_mark(self, key: Hashable, mark: str) -> None:
        with self._lock:
            self._marks[key] = mark
            self._marks.move_to_end(key)
            while len(self._marks) > _REMEMBERED:
                self._marks.popitem(last=False)

    def clear(self) -> None:
        self._take_back()
        with self._lock:
            gone, self._kept = self._kept, OrderedDict()
            self._marks.clear()
        for kept in gone.values():
            for _, last in kept:
                last.wait()

    def __len__(self) -> int:
        self._take_back()
        return sum(map(len, self._kept.values()))


MET, NEVER = "met", "never"  # a solve that was met once; one that cannot be captured
graphs = Graphs()


def being_captured(device: torch.device) -> bool:
    """Whether the caller captures a graph, in which there can be no other."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _stream(device: torch.device) -> Any:
    """On which all is captured: autograd makes a product where func was called, so a way back must be captured there too."""
    return torch.cuda.Stream(device)


def pool(device: torch.device) -> tuple[Any, ...]:
    """Memory for graphs that are never replayed at the same time, and none of which leaves results in it for another."""
    return (torch.cuda.graph_pool_handle(),) if device.type == "cuda" else ()


@contextmanager
def warming_up(device: torch.device) -> Iterator[None]:
    """What is to be captured is done for the first time, on the stream of captures: leaves that are first used there get their
    gradients there."""
    if device.type != "cuda":
        yield
        return
    own, users = _stream(device), torch.cuda.current_stream(device)
    own.wait_stream(users)
    with torch.cuda.stream(own):
        yield
    users.wait_stream(own)


class Busy(RuntimeError):
    """Another thread captures a graph: a process can capture one at a time."""


_capturing = threading.Lock()


@contextmanager
def _alone() -> Iterator[None]:
    """One capture at a time. Nobody waits for another, who may wait for this thread's backward pass. No garbage is collected:
    a graph that goes while one is captured would end it. Matrix products have workspaces of the capture's own."""
    if not _capturing.acquire(blocking=False):
        raise Busy("another thread captures a graph")
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        torch._C._cuda_clearCublasWorkspaces()
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if collects:
            gc.enable()
        _capturing.release()


def _record(graph: Any, step: Callable[[], None], device: torch.device, memory: Any = None) -> None:
    """Other threads may go on with what they do, but for capturing. Raises Busy."""
    how: dict[str, Any] = {"pool": memory, "stream": _stream(device), "capture_error_mode": "thread_local"}
    with _alone(), torch.cuda.device(device):
        before = torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, **how):
                step()
        finally:  # torch leaves its own stream current where a capture fails as it ends
            torch.cuda.set_stream(before)


def capture(step: Callable[[], None], device: torch.device, *memory: Any) -> Callable[[], None]:
    """A replay of the step, which this does not run. memory: of a `pool`. Raises RuntimeError where it cannot be captured.

    The step has run before, so that nothing is set up in it for the first time.
    """
    graph = torch.cuda.CUDAGraph()
    _record(graph, step, device, *memory)
    return graph.replay


def repeat(step: Callable[[], None], status: Tensor) -> Callable[[], None]:
    """What makes captured steps in one launch: as many as `_STEPS_A_LAUNCH`, while a row has the status RUNNING.

    The step is the body of a WHILE node of a graph, so it must not draw random numbers: torch moves its generators on from the
    host, once a launch. Raises RuntimeError where it cannot be captured. status: float64 [rows], on the device.
    """
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    _record(graph, step, status.device)
    left = torch.empty(1, dtype=torch.int64, device=status.device)
    made = _C.Repeat(
        step=graph.raw_cuda_graph(),
        status=status.data_ptr(),
        rows=len(status),
        left=left.data_ptr(),
        steps=_STEPS_A_LAUNCH,
        device=status.device.index or 0,
    )

    def launch(kept: Any = (graph, left, status)) -> None:  # whose memory the graph works on
        made.launch()

    return launch


def captured(step: Callable[[], None], device: torch.device, memory: tuple[Any, ...] = ()) -> Callable[[], None] | None:
    """A replay of the step, or None, with a warning, where it cannot be captured. memory: a `pool`. Raises Busy."""
    try:
        with no_cast_is_kept():
            return capture(step, device, *memory)
    except Busy:
        raise
    except RuntimeError as error:
        _warn(f"func cannot be captured: {_first_line(error)}; the solve goes on without a graph")
        return None


def repeated(step: Callable[[], None], status: Tensor) -> Callable[[], None] | None:
    """The same for `repeat`."""
    try:
        with no_cast_is_kept():
            return repeat(step, status)
    except Busy:
        raise
    except RuntimeError as error:
        _warn(f"the device cannot repeat the step: {_first_line(error)}; each is replayed from the host")
        return None


@contextmanager
def no_cast_is_kept() -> Iterator[None]:
    """Autocast casts weights at each call of func. In a captured graph a cast kept from before would be read where it was; and
    gradients would be added up in the 16 bits of a cast that all calls share."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _warn(words: str) -> None:
    warnings.warn(f"cuda_graph: {words}", stacklevel=5)


class Watch:
    """Tells, late and without waiting for the device, whether a solve has ended.

    status: float64 [rows], on the device. expected: steps; nobody looks before they are nearly done. A look costs one copy, of
    the least status, that of a row which runs, where there are many rows.
    A look costs the host about a tenth of a step or a third of a captured one: so those are best whose distance is near
    half the square root of the steps made. From a look to where the host waits for what it saw are as many, so that the device
    makes at most sqrt(n) steps past the end of n, an eighth of them, or one: 1 of 10, 4 of 37, 10 of 100, 31 of 1,000.
    """

    def __init__(self, status: Tensor, expected: int = 0, on_device: bool = True):
        self._status, self._look_at = status, max(1, expected - expected // _EXPECTED_SHARE)
        self._many = status.numel() > _FEW_ROWS
        self._seen = torch.empty((1,) if self._many else status.shape, dtype=status.dtype, pin_memory=on_device, device="cpu")
        self._event: Any = torch.cuda.Event() if on_device else None
        self._asked = 0  # after which step, 0: nothing is asked

    def ended(self, steps: int) -> bool:
        """steps: how many were begun."""
        if self._asked:
            past_end = max(1, min(isqrt(self._asked), self._asked // _IN_VAIN_SHARE))
            ahead = (past_end + 1) // 2
            if self._event is not None and not self._event.query():
                if steps - self._asked < ahead:
                    return False
                self._event.synchronize()
            if not (self._seen.numpy() == RUNNING).any():
                return True
            self._asked, self._look_at = 0, self._asked + past_end + 1 - ahead
        if steps >= self._look_at:
            self._ask()
            self._asked = steps
        return False

    def ended_now(self) -> bool:
        """The same, once the device has done all that it was given."""
        self._ask()
        if self._event is not None:
            self._event.synchronize()
        return not (self._seen.numpy() == RUNNING).any()

    def _ask(self) -> None:
        status = self._status
        self._seen.copy_(status.amin(0, keepdim=True) if self._many else status, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(status.device) if status.is_cuda else None)
