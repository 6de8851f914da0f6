"""Checks of training: modes, gradients, which parameters get none, and which belong to which part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..detectors import DetectorAdapter
from ..detectors.base import PARTS
from ..end_to_end import EndToEndDetector
from ..structures import DensePredictions
from ..validation import describe
from .examination import Examination, check, made_up_target, reachable, untouched
from .report import Finding, wrong

__all__ = ["gradient", "modes", "parts", "unused_parameters"]


@check("training mode", after=("batches",), hint="return the same in training and in evaluation mode")
@torch.no_grad()
def modes(exam: Examination) -> Finding:
    """Check that training mode changes no map's shape and no decoding."""
    # 1. The maps.
    _train_without_noise(exam.adapter)
    known_maps = exam.small_maps
    maps = exam.adapter.features(exam.small_batch)
    if [x.shape for x in maps] != [x.shape for x in known_maps]:
        expected, got = (f"{[tuple(x.shape) for x in found]}" for found in (known_maps, maps))
        where, fix = f"{exam.name}.features() in training mode", "return the same pyramid in both modes"
        return wrong(f"the maps {expected}", got, where=where, fix=fix)

    # 2. The predictions on the same maps.
    where, known = f"{exam.name}.head() in training mode", exam.predictions.boxes[: exam.few]
    trained: object = exam.head(known_maps)
    if not isinstance(trained, DensePredictions):
        return wrong("DensePredictions in both modes", type(trained).__name__, where=where, fix="decode in both modes")
    expected = "the boxes of evaluation mode"
    if trained.boxes.shape != known.shape:
        got = f"shape {tuple(trained.boxes.shape)} for {tuple(known.shape)}"
        return wrong(expected, got, where=where, fix="decode all points in both modes")
    difference = float((trained.boxes - known).abs().nan_to_num().max())
    if difference > 1e-3 * (1 + float(known.nan_to_num(posinf=0, neginf=0).abs().mean())):
        fix = "decode boxes to pixels in both modes; many models return raw outputs while training"
        return wrong(expected, f"others, by up to {difference:.3g} pixels", where=where, fix=fix)
    return Finding("ok", "training mode changes no box")


def _train_without_noise(adapter: DetectorAdapter) -> None:
    """Set training mode for all but norms and dropout, which are meant to differ."""
    adapter.train()
    for module in adapter.modules():
        if isinstance(module, _NormBase) or "drop" in type(module).__name__.lower():
            module.eval()


# --- gradients --------------------------------------------------------------------------------------------------------


@check("gradient", after=("training mode",))
def gradient(exam: Examination) -> Finding:
    """Check that gradients flow from logits and boxes to every map, and from every map to the network."""
    # 1. From predictions to maps.
    _train_without_noise(exam.adapter)
    leaves = [x.detach().clone().requires_grad_() for x in exam.small_maps]
    predictions = exam.adapter.head([x.clone() for x in leaves], exam.image_size)  # in-place heads may not edit leaves
    silent: list[str] = []
    for field, value in (("logits", predictions.logits), ("boxes", predictions.boxes)):
        total = (value * torch.rand_like(value)).sum()
        grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True) if value.requires_grad else []
        if fault := _no_gradient(exam, field, grads):
            return fault
        silent += [f"{field} of level {i}" for i, grad in enumerate(grads) if grad is not None and not grad.any()]

    # 2. From maps to parameters.
    if fault := _features_do_not_learn(exam):
        return fault
    if silent:
        return Finding(
            "note", f"gradients flow, but none from {', '.join(silent)}: shut by a ReLU or a norm of a single point?"
        )
    return Finding("ok", "gradients flow from logits and boxes to every map and on to the network")


def _no_gradient(exam: Examination, field: str, grads: Sequence[Tensor | None]) -> Finding | None:
    """Find out what is wrong with the gradients of a field to the maps."""
    expected = f"{field} with a gradient to the maps"
    fix = "let no no_grad, detach, .data, .item or numpy between maps and predictions"
    reached = [grad for grad in grads if grad is not None]
    if not grads:
        got = "none at all"
    elif len(reached) < len(grads):
        expected = f"{field} with a gradient to every map"
        got = f"none to features()[{[grad is None for grad in grads].index(True)}]"
    elif not all(grad.isfinite().all() for grad in reached):
        expected, got = f"a finite gradient of {field}", "NaN or infinity"
        fix = "look for sqrt and log at 0, or a norm of 0"
    elif not any(grad.any() for grad in reached):
        got, fix = "zeros alone", "look for a clamp or ReLU that shuts it"
    else:
        return None
    return wrong(expected, got, where=f"{exam.name}.head().{field}", fix=fix)


def _features_do_not_learn(exam: Examination) -> Finding | None:
    """Find out whether a map has no gradient to the network's parameters."""
    weights = [p for p in exam.adapter.parameters() if p.requires_grad]
    if not weights:
        return None
    where, fix = f"{exam.name}.features()", "let no no_grad, detach or inference_mode into features()"
    maps, expected = exam.adapter.features(exam.small_batch), "maps with a gradient to the network's parameters"
    for i, x in enumerate(maps):
        if not x.requires_grad:
            return wrong(expected, "none at all", where=f"{where}[{i}]", fix=fix)
    if reachable(maps).isdisjoint(map(id, weights)):
        return wrong(expected, "none to any of them", where=where, fix="run self.model in features()")
    return None


# --- parameters -------------------------------------------------------------------------------------------------------


@check("unused parameters", after=("finite", "gradient"))
def unused_parameters(exam: Examination) -> Finding:
    """Check that `unused_parameters` lists exactly what one-to-one training leaves without a gradient."""
    # 1. What is listed is the model's.
    where, adapter = f"{exam.name}.unused_parameters()", exam.adapter
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    declared = list(adapter.unused_parameters())
    foreign = [p for p in declared if id(p) not in names]
    if foreign:
        expected, got = "parameters of the model", f"{len(foreign)} of something else"
        return wrong(expected, got, where=where, fix="return parameters of self.model")

    # 2. What a step of training reaches.
    trainable = [p for p in adapter.parameters() if p.requires_grad or any(p is d for d in declared)]
    if len(trainable) == len(declared):
        return Finding("skipped", "no parameter is trainable")
    with untouched(adapter):
        reached, quality = _reached(exam, trainable)

    # 3. Nothing is missing in the list, and nothing is too much.
    idle = [names[id(p)] for p in trainable if id(p) not in reached and not any(p is d for d in declared)]
    if idle:
        expected, got = "a gradient for every parameter that is not declared unused", f"none for {_few(idle)}"
        fix = "return them there, or DistributedDataParallel stops in the second step; or make the model use them"
        if any(id(p) in quality for p in trainable if names[id(p)] in idle):
            fix = "if quality is an objectness, give logits=functional.product_logits(logits, objectness[..., None]) "
            fix += "and no quality; if it is a centerness or an IoU, return its parameters there"
        return wrong(expected, got, where=where, fix=fix)
    busy = [names[id(p)] for p in declared if id(p) in reached]
    if busy:
        expected, got = "unused parameters that get no gradient", f"one for {_few(busy)}"
        return wrong(expected, got, where=where, fix="leave them out; what is declared there is frozen")
    return Finding("ok", f"all parameters learn{f' but the {len(declared)} declared unused' if declared else ''}")


def _reached(exam: Examination, trainable: list[nn.Parameter]) -> tuple[set[int], set[int]]:
    """List by identity what a step of one-to-one training gives a gradient, and what quality would give one."""
    detector = EndToEndDetector(exam.adapter).train()
    for parameter in trainable:
        parameter.requires_grad_(True)  # the detector has frozen those that are declared
    run = detector.run(exam.images, [made_up_target(image) for image in exam.images])
    targets = [target for target in run.targets if target is not None]  # all of them: they were made up
    losses = detector.loss(run.predictions, targets, detector.assigner(run.predictions, targets))
    quality = run.predictions.quality
    return reachable(losses.values()), set() if quality is None else reachable([quality])


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix("model.") for name in names[:3]) + rest


# --- parts ------------------------------------------------------------------------------------------------------------


@check("parts", after=("head",))
def parts(exam: Examination) -> Finding:
    """Check that `parts` names modules of this very adapter, each what its name tells."""
    # 1. A dict of modules with known names.
    where, fix = f"{exam.name}.parts()", 'return a dict of modules of self.model, named "backbone", "neck" and "head"'
    named: object = exam.adapter.parts()
    if not isinstance(named, dict) or not all(isinstance(part, nn.Module) for part in named.values()):
        return wrong("a dict of modules", describe(named), where=where, fix=fix)
    unknown = sorted(set(named) - set(PARTS))
    if unknown:
        return wrong("the names backbone, neck and head alone", ", ".join(unknown), where=where, fix=fix)

    # 2. They are the model's, and run where their names tell.
    own, modules = {id(p) for p in exam.adapter.parameters()}, set(exam.adapter.modules())
    for name, part in named.items():
        weights = list(part.parameters())
        if not {id(p) for p in weights} <= own or (not weights and part not in modules):
            got = "parameters of something else" if weights else f"{type(part).__name__} without any parameter"
            return wrong(f"a {name} that is a part of the model", got, where=where, fix=fix)
        if weights and not _runs(exam, name, weights):
            method = "head" if name == "head" else "features"
            expected, got = f"the {name} to be what {method}() runs", "parameters that it does not depend on"
            return wrong(expected, got, where=where, fix=f"return the {name} that {method}() runs")

    # 3. What is missing.
    missing = [name for name in PARTS if name not in named]
    if missing:
        needs = "inherit() copies backbone and neck by default, AuxiliaryHead a head"
        return Finding("note", f"parts() names no {' or '.join(missing)}; {needs}")
    return Finding("ok", "parts() names backbone, neck and head")


def _runs(exam: Examination, name: str, weights: Sequence[nn.Parameter]) -> bool:
    """Whether the maps depend on parameters of a backbone or neck, or the predictions on those of a head."""
    with untouched(exam.adapter):
        exam.adapter.requires_grad_(True)
        if name == "head":
            predictions = exam.adapter.head([x.detach().clone() for x in exam.small_maps], exam.image_size)
            outputs = [predictions.logits, predictions.boxes]
        else:
            outputs = exam.adapter.features(exam.small_batch)
        reached = reachable(outputs)
        return not reached or not reached.isdisjoint(map(id, weights))
