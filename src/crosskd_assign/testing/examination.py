"""What the checks share: the adapter and what it returns, the decorator that makes a check, and a guard around all."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ..detectors import DetectorAdapter, Probe, probe_detector
from ..detectors.probing import evaluation_mode, first_line
from ..errors import CrossKDError
from ..structures import Batch, DensePredictions, Target
from .report import BUILDS_ON, AdapterCheck, Finding, wrong

__all__ = ["Check", "Examination", "check", "close", "fields", "made_up_target", "reachable", "untouched"]


@dataclass(frozen=True)
class Check:
    """A check: a function that examines an adapter, what it is called, and which checks it builds on.

    Attributes:
        name: Its name in the report.
        after: Names of checks that have to come first; if one has failed, this one would only repeat it.
        hint: How to mend an exception that the adapter raises in it.
        function: The check itself.
    """

    name: str
    after: tuple[str, ...]
    hint: str
    function: Callable[[Examination], Finding]

    def run(self, exam: Examination, earlier: Mapping[str, AdapterCheck]) -> AdapterCheck:
        """Run the check in evaluation mode, unless one that it builds on has failed."""
        failed = [name for name in self.after if earlier[name].outcome in ("wrong", "skipped")]
        finding = Finding("skipped", f'{BUILDS_ON} "{failed[0]}"; see there') if failed else self._examine(exam)
        return AdapterCheck(name=self.name, **vars(finding))

    def _examine(self, exam: Examination) -> Finding:
        exam.adapter.eval()
        torch.manual_seed(0)  # what one check draws depends on no other
        try:
            return self.function(exam)
        except CrossKDError as error:
            return Finding.of(error)
        except Exception as error:  # whatever a stranger's code raises is what there is to report
            return wrong("no exception", first_line(error), where=_line_of(error, self.name), fix=self.hint)


def check(
    name: str, *, after: Sequence[str] = (), hint: str = "mend what this line does"
) -> Callable[[Callable[[Examination], Finding]], Check]:
    """Make a `Check` of the function below; the arguments are its attributes."""
    return lambda function: Check(name, tuple(after), hint, function)


@dataclass
class Examination:
    """An adapter, what it is given, and what it returns: computed when a check first asks, in evaluation mode.

    A check that asks for what an adapter returns names the check of its form in ``after``.

    Attributes:
        adapter: The adapter under examination.
        images: Two images or more.
        targets: One an image, made up where none were given.
        targets_given: Whether they were given.
    """

    adapter: DetectorAdapter
    images: list[Tensor]
    targets: list[Target]
    targets_given: bool

    @classmethod
    def of(cls, adapter: DetectorAdapter, images: Sequence[Tensor], targets: Sequence[Target] | None) -> Self:
        """Begin with copies; a single image is mirrored, to have two."""
        used = [made_up_target(image) for image in images] if targets is None else list(targets)
        copies = [image.clone() for image in images]
        moved: list[Target] = [{**target, "boxes": target["boxes"].clone()} for target in used]
        if len(copies) == 1:
            width = copies[0].shape[-1]
            boxes = moved[0]["boxes"].clone()
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            copies.append(copies[0].flip(-1))
            moved.append(Target(boxes=boxes, labels=moved[0]["labels"]))
        return cls(adapter, copies, moved, targets is not None)

    @property
    def name(self) -> str:
        """The adapter's class."""
        return type(self.adapter).__name__

    # --- what the adapter returns, once -------------------------------------------------------------------------------

    @cached_property
    def preprocessed(self) -> tuple[Batch, list[Target | None]]:
        """What `preprocess` returns."""
        with evaluation_mode(self.adapter):
            return self.adapter.preprocess(self.images, self.targets)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the batch."""
        return self.preprocessed[0].image_size

    @cached_property
    def maps(self) -> list[Tensor]:
        """What `features` returns for the batch."""
        with evaluation_mode(self.adapter):
            batch, _ = self.preprocessed
            return self.adapter.features(replace(batch, images=batch.images.clone()))  # an adapter may edit it

    @property
    def few(self) -> int:
        """How many images a pass needs: one, or two where a map is a single point, of which norms refuse one."""
        return 1 if all(x.shape[-2:].numel() > 1 for x in self.maps) else 2

    @property
    def small_batch(self) -> Batch:
        """The first image or two, a copy each time."""
        b, n = self.preprocessed[0], self.few
        return Batch(b.images[:n].clone(), b.sizes[:n], b.original_sizes[:n])

    @property
    def small_maps(self) -> list[Tensor]:
        """The maps of the first image or two."""
        return [x[: self.few] for x in self.maps]

    @cached_property
    def predictions(self) -> DensePredictions:
        """What `head` returns for the maps."""
        with evaluation_mode(self.adapter):
            return self.head(self.maps)

    @cached_property
    def probe(self) -> Probe:
        """What a blank image tells of the detector."""
        return probe_detector(self.adapter)

    # --- weights ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def wake(self) -> None:
        """Stir the smallest weights of a head whose predictions hardly depend on its maps.

        Many heads start with output convolutions that are zero or tiny; nothing can be seen in what they predict.
        `untouched` brings the weights back.
        """
        # 1. Do logits and boxes change with the maps?
        maps = self.small_maps
        plain, changed = self.head(maps), self.head([x + (x.std() + 0.1) * torch.randn_like(x) for x in maps])
        boxes = (changed.boxes - plain.boxes) / plain.strides[:, None]
        if all(float(x.abs().nan_to_num().mean()) > 1e-2 for x in (changed.logits - plain.logits, boxes)):
            return

        # 2. Stir what is far smaller than layers are that keep the size of what goes through them.
        with untouched(self.adapter):
            self.adapter.requires_grad_(True)
            predictions = self.adapter.head([x.clone() for x in maps], self.image_size)
            reached = reachable([predictions.logits, predictions.boxes])
        for parameter in self.adapter.parameters():
            if id(parameter) in reached and parameter.dim() > 1:
                usual = parameter[0].numel() ** -0.5
                if float(parameter.square().mean().sqrt()) < 0.5 * usual:
                    parameter.add_(usual * torch.randn_like(parameter))
        for name in ("maps", "predictions"):
            vars(self).pop(name, None)

    # --- what it returns for something else, in its present mode ------------------------------------------------------

    @torch.no_grad()
    def head(self, maps: Sequence[Tensor], image_size: tuple[int, int] | None = None) -> DensePredictions:
        """Run the head on copies of maps, which it may edit; of the batch's size, unless another is given."""
        return self.adapter.head([x.clone() for x in maps], image_size or self.image_size)

    @torch.no_grad()
    def predict(self, batch: Batch) -> DensePredictions:
        """Run features and head."""
        return self.head(self.adapter.features(batch), batch.image_size)


def made_up_target(image: Tensor) -> Target:
    """Make up one box of label 0 in the middle of an image."""
    height, width = image.shape[-2:]
    box = image.new_tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]], dtype=torch.float32)
    return Target(boxes=box, labels=torch.zeros(1, dtype=torch.int64, device=image.device))


# --- predictions ------------------------------------------------------------------------------------------------------


def fields(predictions: DensePredictions) -> dict[str, Tensor]:
    """List what a head predicts for every image, by name."""
    names = ("logits", "boxes", "quality", "distribution")
    return {name: value for name in names if (value := getattr(predictions, name)) is not None}


def close(one: DensePredictions, other: DensePredictions, tolerance: float, *, images: slice = slice(None)) -> bool:
    """Whether predictions of these images agree up to a share of their magnitude."""
    a, b = fields(one), fields(other)
    return a.keys() == b.keys() and all(_close(a[name][images], b[name][images], tolerance) for name in a)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    magnitude = float(b.nan_to_num(posinf=0, neginf=0).abs().mean()) + 1e-6
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * magnitude, equal_nan=True)


def reachable(outputs: Collection[Tensor]) -> set[int]:
    """List by identity the leaves that outputs have a gradient to, without computing it."""
    seen: set[Any] = set()
    leaves = {id(x) for x in outputs if x.requires_grad and x.grad_fn is None}
    nodes: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            leaves |= {id(leaf) for leaf in [getattr(node, "variable", None)] if leaf is not None}
            nodes += [following for following, _ in node.next_functions if following is not None]
    return leaves


# --- exceptions -------------------------------------------------------------------------------------------------------


def _line_of(error: Exception, otherwise: str) -> str:
    """Name the last line of the adapter's own code that an exception passed."""
    package = Path(__file__).parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if package not in path.parents and "site-packages" not in path.parts:
            return f"{path.name}, line {frame.lineno}, in {frame.name}"
    return otherwise


# --- the guard --------------------------------------------------------------------------------------------------------


@contextmanager
def untouched(adapter: DetectorAdapter) -> Iterator[None]:
    """Guard an adapter and the random state: they come out as they went in, whatever happens inside."""
    # 1. What there is to restore.
    modules = list(adapter.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in adapter.parameters()]
    values = [(x, x.detach().clone()) for x in [*adapter.parameters(), *adapter.buffers()]]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = list({x.device for x, _ in values if x.device.type == "cuda"})

    # 2. Whatever happens, with gradients switched on and none from before.
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            for parameter, _, _ in parameters:
                parameter.grad = None
            yield

    # 3. Everything as it was.
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        with torch.no_grad():
            for module, before in attributes:
                _restore(vars(module), before)
            for module, before in buffers:
                _restore(module._buffers, before)
            for x, value in values:
                if not torch.equal(x, value):
                    x.copy_(value)
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Bring a dict back to what it held, if it holds anything else."""
    if now.keys() != before.keys() or any(now[key] is not value for key, value in before.items()):
        now.clear()
        now.update(before)
