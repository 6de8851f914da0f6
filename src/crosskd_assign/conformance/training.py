"""Checks of training: modes, gradients, and which parameters get none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..detectors import DetectorAdapter
from ..end_to_end import EndToEndDetector
from ..structures import DensePredictions
from .examination import Examination, Finding, Note, Skip, untouched, wrong

__all__ = ["gradient", "modes", "trunk", "unused_parameters"]


def modes(e: Examination) -> Finding:
    """Training mode changes no decoding."""
    where = f"{e.name}.head() in training mode"
    _train_without_noise(e.adapter)
    with torch.no_grad():
        maps = e.adapter.features(e.batch)
    if [x.shape for x in maps] != [x.shape for x in e.maps]:
        got = f"{[tuple(x.shape) for x in maps]}"
        fix = "return the same pyramid in both modes"
        raise wrong(f"the maps {[tuple(x.shape) for x in e.maps]}", got, f"{e.name}.features() in training mode", fix)
    trained: object = e.head(e.maps, e.batch)
    if not isinstance(trained, DensePredictions):
        raise wrong("DensePredictions in both modes", type(trained).__name__, where, "decode in both modes")
    if trained.boxes.shape != e.predictions.boxes.shape:
        got = f"shape {tuple(trained.boxes.shape)} for {tuple(e.predictions.boxes.shape)}"
        raise wrong("the boxes of evaluation mode", got, where, "decode all points in both modes")
    difference = float((trained.boxes - e.predictions.boxes).abs().nan_to_num().max())
    if difference > 1e-3 * (1 + float(e.predictions.boxes.nan_to_num(posinf=0, neginf=0).abs().mean())):
        fix = "decode boxes to pixels in both modes; many models return raw outputs while training"
        raise wrong("the boxes of evaluation mode", f"others, by up to {difference:.3g} pixels", where, fix)
    return "training mode changes no box"


def _train_without_noise(adapter: DetectorAdapter) -> None:
    """Training mode for all but norms and dropout, which are meant to differ."""
    adapter.train()
    for module in adapter.modules():
        if isinstance(module, _NormBase) or "drop" in type(module).__name__.lower():
            module.eval()


def gradient(e: Examination) -> Finding:
    """From logits and boxes to every map, and from every map to the trunk."""
    _train_without_noise(e.adapter)
    leaves = [x.detach().clone().requires_grad_() for x in e.maps]
    predictions = e.adapter.head([x.clone() for x in leaves], e.batch)  # in-place heads may not edit leaves
    silent: list[str] = []
    for field in ("logits", "boxes"):
        value: Tensor = getattr(predictions, field)
        where = f"{e.name}.head().{field}"
        fix = "let no no_grad, detach, .data, .item or numpy between maps and predictions"
        if not value.requires_grad:
            raise wrong(f"{field} with a gradient to the maps", "none at all", where, fix)
        grads = torch.autograd.grad(
            (value * torch.rand_like(value)).sum(), leaves, retain_graph=True, allow_unused=True
        )
        lost = [i for i, grad in enumerate(grads) if grad is None]
        if lost:
            raise wrong(f"{field} with a gradient to every map", f"none to features()[{lost[0]}]", where, fix)
        if not all(grad.isfinite().all() for grad in grads if grad is not None):
            raise wrong(
                f"a finite gradient of {field}", "NaN or infinity", where, "look for sqrt and log at 0, or a norm of 0"
            )
        zero = [i for i, grad in enumerate(grads) if grad is not None and not grad.any()]
        if len(zero) == len(leaves):
            raise wrong(
                f"{field} with a gradient to the maps", "zeros alone", where, "look for a clamp or ReLU that shuts it"
            )
        silent += [f"{field} of level {i}" for i in zero]
    _check_features_learn(e)
    if silent:
        return Note(f"gradients flow, but none from {', '.join(silent)}: shut by a ReLU or a norm of a single point?")
    return "gradients flow from logits and boxes to every map and on to the trunk"


def _check_features_learn(e: Examination) -> None:
    where = f"{e.name}.features()"
    weights = [p for p in e.adapter.trunk().parameters() if p.requires_grad]
    if not weights:
        return
    maps = e.adapter.features(e.batch)
    fix = "let no no_grad, detach or inference_mode into features()"
    for i, x in enumerate(maps):
        if not x.requires_grad:
            raise wrong("maps with a gradient to the trunk's parameters", "none at all", f"{where}[{i}]", fix)
    grads = torch.autograd.grad(torch.stack([x.sum() for x in maps]).sum(), weights, allow_unused=True)
    if all(grad is None for grad in grads):
        fix = "return in trunk() what features() runs"
        raise wrong("maps with a gradient to the trunk's parameters", "none to any of them", where, fix)


def unused_parameters(e: Examination) -> Finding:
    """`unused_parameters` names exactly what one-to-one training leaves without a gradient."""
    adapter = e.adapter
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    declared = list(adapter.unused_parameters())
    where = f"{e.name}.unused_parameters()"
    foreign = [p for p in declared if id(p) not in names]
    if foreign:
        fix = "return parameters of self.model"
        raise wrong("parameters of the model", f"{len(foreign)} of something else", where, fix)
    trainable = [p for p in adapter.parameters() if p.requires_grad or any(p is d for d in declared)]
    if len(trainable) == len(declared):
        raise Skip("no parameter is trainable")
    with untouched(adapter):
        reached = _reached(e, trainable)
    kept = {id(p) for p in declared}
    idle = [names[id(p)] for p in trainable if id(p) not in reached | kept]
    if idle:
        fix = "return them there, or DistributedDataParallel stops in the second step; or make the model use them"
        raise wrong("a gradient for every parameter that is not declared unused", f"none for {_few(idle)}", where, fix)
    busy = [names[id(p)] for p in declared if id(p) in reached]
    if busy:
        fix = "leave them out; what is declared there is frozen"
        raise wrong("unused parameters that get no gradient", f"one for {_few(busy)}", where, fix)
    return f"all parameters learn{f' but the {len(declared)} declared unused' if declared else ''}"


def _reached(e: Examination, trainable: list[nn.Parameter]) -> set[int]:
    """Which of these parameters a step of one-to-one training gives a gradient, by identity."""
    channels = e.predictions.logits.shape[-1]
    targets = [{**target, "labels": target["labels"].clamp(0, channels - 1)} for target in e.targets]
    detector = EndToEndDetector(e.adapter)
    for parameter in trainable:
        parameter.requires_grad_(True)  # the detector has frozen those that are declared
    losses = detector.train()(e.images, targets)
    total = torch.stack(list(losses.values())).sum()
    grads = torch.autograd.grad(total, trainable, allow_unused=True)
    return {id(p) for p, grad in zip(trainable, grads, strict=True) if grad is not None}


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix("model.") for name in names[:3]) + rest


def trunk(e: Examination) -> Finding:
    """Backbone and neck, of this very adapter."""
    part: object = e.adapter.trunk()
    where, fix = f"{e.name}.trunk()", "return the module that features() runs: backbone and neck"
    if not isinstance(part, nn.Module) or not any(True for _ in part.parameters()):
        raise wrong("a module with parameters", f"{type(part).__name__} without any", where, fix)
    own = {id(p) for p in e.adapter.parameters()}
    if not all(id(p) in own for p in part.parameters()):
        raise wrong("a part of the model", "parameters of something else", where, fix)
    if part is e.adapter.model:
        return Note("trunk() is the whole model; return backbone and neck if inherit() is to leave the head alone")
    return f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters"
