"""Processes that load images, and their end: in time, whatever happens, and without a traceback of theirs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from coco_example.data.dataset import Target, collate
from coco_example.engine.signals import deferred_signals, leave_signals_alone
from coco_example.errors import DataError, FileError, RunError, first_line
from crosskd_assign.errors import CrossKDError

__all__ = ["loaded", "spare_processes"]

_PATIENCE = 10.0  # seconds
_FEW_CORES = 4  # of fewer, training itself leaves none
_MOST_PROCESSES = 4  # feed an H100 twice over, see docs/benchmarks.md; each holds two batches in shared memory
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - not written to here
_LEAST_SHARED = 1 << 30  # bytes; a container often has 64 MiB

Item: TypeAlias = tuple[Tensor, Target | None]
Batch: TypeAlias = tuple[list[Tensor], list[Any]]


@contextmanager
def loaded(
    dataset: Dataset[Item], batches: Iterable[Sequence[Any]], *, workers: int, pin_memory: bool = False
) -> Iterator[Iterator[Batch]]:
    """Load batches of a dataset while the block runs, in processes that end with it.

    Args:
        dataset: The images.
        batches: Keys of the images of each batch.
        workers: Processes that load; 0: this one; -1: as many as `spare_processes`, and no more than there are batches.
        pin_memory: Whether batches go to an accelerator.

    Raises:
        CrossKDError: An image cannot be loaded, or a process was killed.
    """
    if workers < 0:
        workers = min(spare_processes(), len(batches) if isinstance(batches, Sized) else sys.maxsize)
    others = set(multiprocessing.active_children())
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of keys will do
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=leave_signals_alone,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without its own it would draw from the generator that training resumes
    )
    iterator: Any = None
    try:
        with deferred_signals():
            # A collection in a forked process writes to every object, and so copies all memory that it shares.
            gc.freeze()
            try:
                iterator = iter(loader)
            finally:
                gc.unfreeze()
        yield _received(iterator)
    except RuntimeError as error:  # raised anywhere in the block, by torch's handler of SIGCHLD
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _lost(error) from error
    finally:
        with deferred_signals():
            _end(iterator, set(multiprocessing.active_children()) - others)


def spare_processes() -> int:
    """Count the processes that may load images for this one: its share of the cores but one; 0 on a small machine."""
    if sys.platform != "linux":
        return 0  # where processes are not forked, each gets a copy of the annotations
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        room = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        room = 0
    return min(cores - 1, _MOST_PROCESSES) if cores >= _FEW_CORES and room >= _LEAST_SHARED else 0


def _end(iterator: Any, processes: Iterable[Any]) -> None:
    """Kill processes: they ignore what asks them to stop, may hang in a read, and Python would wait for them."""
    # 1. Torch's handler of SIGCHLD would take their end for an accident.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if sys.platform != "win32" else None
    for process in processes:
        process.kill()
    for process in processes:
        process.join()

    # 2. Let the iterator find them ended, for it may live on in a traceback. A process that was killed with a lock in
    # its hands would keep it waiting.
    if hasattr(iterator, "__del__"):
        ending = threading.Thread(target=iterator.__del__, daemon=True)
        ending.start()
        ending.join(timeout=_PATIENCE)
    if sys.platform != "win32" and before is not None:
        signal.signal(signal.SIGCHLD, before)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a loader's process, as torch would send it with a traceback in its message."""

    kind: type[CrossKDError]
    message: str


class _Guarded(Dataset[Any]):
    """A dataset whose expected errors are items."""

    def __init__(self, dataset: Dataset[Item]) -> None:
        self._dataset = dataset

    def __getitem__(self, key: Any) -> Item | _Failure:
        try:
            return self._dataset[key]
        except CrossKDError as error:
            return _Failure(type(error), str(error))
        except OSError as error:
            return _Failure(FileError, str(FileError.of(error)))
        except MemoryError:
            return _Failure(DataError, "Expected enough memory for an image, but got none. Fix: lower --workers.")


def _collate(items: Sequence[Any]) -> Batch | _Failure:
    failure = next((item for item in items if isinstance(item, _Failure)), None)
    if failure is not None:
        return failure
    images, targets = collate(items)
    if get_worker_info() is not None:
        # The queue would do it, too, but where it fails it prints a traceback, drops the batch and lets us wait for it.
        try:
            for tensor in (*images, *(value for target in targets if target is not None for value in target.values())):
                tensor.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        except (OSError, RuntimeError) as error:
            return _Failure(RunError, str(_lost(error)))
    return images, targets


def _received(iterator: Iterator[Batch | _Failure]) -> Iterator[Batch]:
    try:
        for batch in iterator:
            if isinstance(batch, _Failure):
                raise batch.kind(batch.message)
            yield batch
    except (OSError, EOFError) as error:  # a process was killed while it sent a batch; its own errors are failures
        raise _lost(error) from error


def _lost(error: Exception) -> RunError:
    return RunError(
        expected="the processes that load images to live and to pass them on",
        got=first_line(error).rstrip(". "),
        where="--workers",
        fix="see whether memory, shared memory or open files are short, lower --workers, and go on with --resume",
    )
