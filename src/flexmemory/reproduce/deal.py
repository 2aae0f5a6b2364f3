"""Jobs dealt over devices, several at once on each: every place is a process of its own that stays on its device."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")


def deal(
    jobs: Mapping[str, Callable[[str], Result]], *, devices: Sequence[str], at_once: int
) -> Iterator[tuple[str, Result]]:
    """Do jobs, begun in their order, each given its device; what they return, as it comes.

    With a single place they are done in this process, and their errors are theirs. Jobs must be picklable otherwise.

    Raises:
        RuntimeError: some failed; the others were done.
    """
    if len(devices) * at_once == 1:
        yield from ((name, job(devices[0])) for name, job in jobs.items())
        return
    waiting, failed = iter(jobs.items()), list[str]()
    running: dict[Future[Result], tuple[str, tuple[str, ProcessPoolExecutor]]] = {}
    with contextlib.ExitStack() as stack:
        places = min(len(devices) * at_once, len(jobs))
        threads = max(1, multiprocessing.cpu_count() // max(1, places))
        on = [devices[place % len(devices)] for place in reversed(range(places))]
        free = [(device, stack.enter_context(_process(device, threads))) for device in on]
        while True:
            while free and (job := next(waiting, None)) is not None:
                device, process = free.pop()
                running[process.submit(job[1], device)] = job[0], (device, process)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, place = running.pop(future)
                error = future.exception()
                if not isinstance(error, BrokenExecutor):
                    free.append(place)
                if error is None:
                    yield name, future.result()
                else:
                    failed.append(f"{name}: {error or type(error).__name__}")
    failed += [f"{name}: no process is left" for name, _ in waiting]
    if failed:
        raise RuntimeError("not everything was done; the same command goes on:\n" + "\n".join(failed))


def _process(device: str, threads: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(device, threads))


def _begin(device: str, threads: int) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # kernels go to the current one, wherever their tensors are
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.WARNING)
