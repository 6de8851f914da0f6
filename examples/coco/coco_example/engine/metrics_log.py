"""Log a training run: a progress bar on a terminal, JSON lines anywhere else, and ``metrics.jsonl`` on disk."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from tqdm import tqdm
from typing_extensions import Self

from coco_example.errors import DataError, printable
from coco_example.files import write_whole
from crosskd_assign.errors import OptionError

if sys.platform != "win32":
    import resource

_FILE = "metrics.jsonl"
_NOTHING: Mapping[str, float] = MappingProxyType({})


class MetricsLog:
    """Show and store the numbers of one training run.

    Reading a loss from the GPU waits for the GPU, so a loop calls :meth:`wants` first and waits once an interval::

        with MetricsLog(folder, total_steps=90_000, batch_size=16) as log:
            for step, batch in enumerate(batches, start=1):
                losses = train_one_step(batch)
                log.tick()
                if log.wants(step):
                    log.step(step, {name: loss.item() for name, loss in losses.items()}, epoch=epoch, lr=lr)

    ``metrics.jsonl`` has one JSON object a line with ``kind``, ``step`` and ``seconds`` (of training, earlier parts of
    a resumed run included), and

    - ``"train"``: ``epoch``, ``lr``, ``losses``, ``images_per_second``, ``memory_mb``, ``extra``;
    - ``"validation"``: ``epoch``, ``losses``, ``images``;
    - ``"eval"``: ``epoch``, ``scores``;
    - ``"event"``: ``message``.

    Numbers that JSON lacks (NaN, infinity) are written as null. Lines are appended whole, one write each; those of
    steps after ``start_step``, and a last line that a crash tore, are removed when the log is opened again.

    Args:
        folder: The run's folder, created if absent.
        total_steps: Number of the last step. Steps count from 1.
        start_step: Number of steps done before, when resuming from a checkpoint.
        batch_size: Images of one step over all ranks, the default of :meth:`tick`.
        enabled: Pass False on all ranks but 0: every method then does nothing.
        interval: Steps from one line to the next.
        hook: Gets each line as a dict, after it is written.

    Raises:
        OptionError: If ``interval`` is not positive.
        DataError: If an existing log holds anything but JSON objects.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        batch_size: int,
        enabled: bool = True,
        interval: int = 50,
        hook: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if interval < 1:
            raise OptionError(
                expected="an interval of at least 1 step", got=f"{interval}", where="MetricsLog", fix="pass interval=50"
            )
        # 1. Note the options, and count from here.
        self.path = folder / _FILE
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.enabled = enabled
        self.interval = interval
        self._hook = hook
        self._first_step = start_step + 1
        self._last_step = start_step
        self._images = 0  # since the last line
        self._done: set[tuple[str, int]] = set()  # kind and step of evaluations
        self._bar: Any = None
        if not enabled:
            return
        # 2. Continue the log of an earlier part of the run.
        folder.mkdir(parents=True, exist_ok=True)
        earlier_lines = _drop_after(self.path, start_step)
        earlier = max((line["seconds"] for line in earlier_lines), default=0.0)
        self._done = {(line["kind"], line["step"]) for line in earlier_lines}
        self._window = time.perf_counter()
        self._start = self._window - earlier
        # 3. Show a bar where somebody watches.
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                dynamic_ncols=True,
                smoothing=0.05,  # an ETA that one slow batch does not shake
                bar_format="{desc}{n_fmt}/{total_fmt} {percentage:3.0f}% |{bar:10}| {elapsed}<{remaining}{postfix}",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal's last line. Everything is on disk already."""
        if self._bar is not None:
            self._bar.close()

    def wants(self, step: int) -> bool:
        """Return whether to report ``step``: the run's first, its last, and every ``interval``-th."""
        return self.enabled and (step % self.interval == 0 or step in (self._first_step, self.total_steps))

    def tick(self, images: int | None = None) -> None:
        """Count one training step; reads nothing from the device.

        Args:
            images: Images of this step over all ranks, if not ``batch_size``.
        """
        self._images += self.batch_size if images is None else images
        if self._bar is not None:
            self._bar.update()

    def step(
        self,
        step: int,
        losses: Mapping[str, float],
        extra: Mapping[str, float] = _NOTHING,
        *,
        epoch: float,
        lr: float,
    ) -> None:
        """Report a training step. Call it where :meth:`wants` returns True, after :meth:`tick`.

        Args:
            step: Number of steps done.
            losses: The loss terms as they are summed, as Python floats.
            extra: Further numbers worth keeping, such as the gradient norm.
            epoch: Passes over the data so far.
            lr: Learning rate of this step.
        """
        if not self.enabled:
            return
        # 1. Measure since the last report.
        rate = self._images / max(time.perf_counter() - self._window, 1e-9)
        memory = _memory_mb()
        self._restart_window()
        # 2. Write the line.
        self._write(
            "train",
            step,
            epoch=epoch,
            losses=losses,
            lr=lr,
            images_per_second=round(rate, 2),
            memory_mb=round(memory, 1),
            extra=extra,
        )
        # 3. Update the bar; the widest part stands last, where a narrow terminal cuts.
        if self._bar is not None:
            terms = " ".join(f"{name} {value:.3f}" for name, value in {**losses, **extra}.items())
            self._bar.set_description_str(f"epoch {epoch:.1f} ", refresh=False)
            self._bar.set_postfix_str(
                f"loss {sum(losses.values()):.3f} · {rate:.0f} img/s · {memory / 1024:.1f}G · {terms}"
            )

    def has(self, kind: str, step: int) -> bool:
        """Return whether an evaluation ("eval") or validation after a step is in the log already."""
        return (kind, step) in self._done

    def validation(self, step: int, epoch: float, losses: Mapping[str, float], images: int) -> None:
        """Report losses on validation images, means over ``images`` of them, as `evaluation` does scores."""
        self._once("validation", step, epoch, losses, losses=losses, images=images)

    def evaluation(self, step: int, epoch: float, scores: Mapping[str, float]) -> None:
        """Report an evaluation, unless one of that step is in the log: a resumed run may repeat its last.

        Images per second do not include its duration.

        Args:
            step: Number of steps done.
            epoch: Passes over the data so far.
            scores: Any scores, such as ``ap`` without and ``ap_nms`` with NMS, 0..1.
        """
        self._once("eval", step, epoch, scores, scores=scores)

    def _once(self, kind: str, step: int, epoch: float, shown: Mapping[str, float], **fields: object) -> None:
        if not self.enabled:
            return
        if not self.has(kind, step):
            self._write(kind, step, epoch=epoch, **fields)
            self._done.add((kind, step))
        self._restart_window()
        if self._bar is not None:
            numbers = " · ".join(f"{name} {value:.4f}" for name, value in shown.items())
            start = f"epoch {epoch:.1f} · step {step}" + (" · validation" if kind == "validation" else "")
            self._bar.write(f"{start} · {numbers}", file=sys.stderr)

    def message(self, text: str) -> None:
        """Print a message, above the bar, and log it as an event of the last reported step."""
        if not self.enabled:
            return
        self._write("event", self._last_step, message=text)
        if self._bar is not None:
            self._bar.write(printable(text), file=sys.stderr)

    def _restart_window(self) -> None:
        """Restart counting images per second."""
        self._images, self._window = 0, time.perf_counter()

    def _write(self, kind: str, step: int, **fields: object) -> None:
        """Append one line to the file and, where no bar is shown, to stdout."""
        self._last_step = step
        seconds = round(time.perf_counter() - self._start, 3)
        record = _plain({"kind": kind, "step": step, **fields, "seconds": seconds})
        line = json.dumps(record, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            error.filename = str(self.path)  # the system's own error of a full disk does not name it
            raise
        if self._bar is None:
            print(line, flush=True)
        if self._hook is not None:
            self._hook(record)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's log.

    Args:
        folder: The run's folder.

    Returns:
        The lines of ``metrics.jsonl`` in order, described at :class:`MetricsLog`; empty if there is no such file. A
        last line that a crash tore is left out.

    Raises:
        DataError: If another line is not a JSON object.
    """
    path = folder / _FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if _is_line(value):
            metrics.append(value)
        elif isinstance(value, dict) or number < len(lines):
            raise DataError(
                expected="a JSON object with the kind, step and seconds of a log on every line",
                got=f"{line[:40]!r}",
                where=f"line {number} of {path}",
                fix="remove that line, or use another folder",
            )
    return metrics


def _is_line(value: Any) -> bool:
    """Return whether a value is a line of a log, with what its readers rely on."""
    if not isinstance(value, dict):
        return False
    numbers = value.get("scores" if value.get("kind") == "eval" else "losses", {})
    return (
        value.get("kind") in ("train", "validation", "eval", "event")
        and type(value.get("step")) is int
        and _is_number(value.setdefault("seconds", 0.0))
        and isinstance(numbers, dict)
        and all(number is None or _is_number(number) for number in numbers.values())
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _drop_after(path: Path, start_step: int) -> list[dict[str, Any]]:
    """Remove the lines that a killed run wrote after its checkpoint, so that curves have no double points.

    Args:
        path: The log; need not exist. Replaced in one piece, and only if a line goes.
        start_step: Last step to keep.

    Returns:
        The lines that stay.
    """
    earlier = [line for line in read_metrics(path.parent) if line["step"] <= start_step]
    text = "".join(json.dumps(line) + "\n" for line in earlier)
    if path.exists() and path.read_bytes() != text.encode():
        write_whole(path, text.encode())
    return earlier


def _plain(value: Any) -> Any:
    """Copy nested mappings as dicts, scalars of NumPy or torch as floats, with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (str, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _memory_mb() -> float:
    """Measure the peak memory in MiB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()):  # nothing in a run on the CPU
        return used / 2**20
    if sys.platform == "win32":
        return 0.0  # Windows has no such count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
