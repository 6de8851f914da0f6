"""Distillation in the shape of torchvision's reference loop: ``python examples/trainers/torchvision_reference.py``.

``references/detection`` trains any model that returns a dict of losses in training mode, and detections in evaluation
mode. A distiller is one, so its ``train_one_epoch`` and ``evaluate`` take a distiller as they take a Faster R-CNN.
Below is a loop of that shape, of our own writing, with the three places that deserve a look marked by "here".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rectangles import Rectangles, collate
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import fcos_resnet50_fpn

from crosskd_assign import CrossHeadDistiller
from crosskd_assign.structures import Detection, Target

__all__ = ["evaluate", "main", "mean_over_processes", "train_one_epoch"]

Batches = Iterable[tuple[Sequence[Tensor], Sequence[Target]]]


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Batches,
    device: torch.device,
    *,
    warmup: int = 0,
    scaler: torch.amp.GradScaler | None = None,
) -> list[dict[str, float]]:
    """Train for one epoch; return the losses of every step, averaged over all processes.

    Args:
        model: A distiller, or `DistributedDataParallel` around one.
        optimizer: Of its parameters, among which no teacher's are.
        loader: Batches of images and targets.
        device: Where to train.
        warmup: Steps over which the learning rate rises; the first epoch's only.
        scaler: For half precision.
    """
    # 1. The modes; here: a teacher stays in evaluation mode, whatever train() does.
    model.train()
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=warmup) if warmup else None
    history = []
    for images, targets in loader:
        # 2. The losses; here: there are those of distillation among them, weighted already, and all are summed.
        on_device = [Target(boxes=t["boxes"].to(device), labels=t["labels"].to(device)) for t in targets]
        with torch.autocast(device.type, enabled=scaler is not None):
            losses: dict[str, Tensor] = model([image.to(device) for image in images], on_device)
        total = torch.stack(list(losses.values())).sum()
        history.append(mean_over_processes(losses))
        if not math.isfinite(sum(history[-1].values())):
            raise FloatingPointError(f"the loss is {sum(history[-1].values())}: {history[-1]}")

        # 3. One step.
        optimizer.zero_grad()
        if scaler is None:
            total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
        else:
            scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
        if schedule is not None:
            schedule.step()
    return history


def mean_over_processes(losses: dict[str, Tensor]) -> dict[str, float]:
    """Average each loss over all processes, to be logged."""
    values = torch.stack([losses[name].detach() for name in sorted(losses)])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(sorted(losses), values.tolist(), strict=True))


@torch.no_grad()
def evaluate(model: nn.Module, loader: Batches, device: torch.device) -> list[Detection]:
    """Detect in all images; here: without NMS, in torchvision's format, boxes in pixels of the images that came in.

    Args:
        model: A distiller.
        loader: Batches of images and targets.
        device: Where to detect.

    Returns:
        What torchvision's ``CocoEvaluator.update`` takes, one for an image, once an image id is its key.
    """
    model.eval()
    found: list[Any] = []
    for images, _ in loader:
        outputs = model([image.to(device) for image in images])
        found += [{name: value.cpu() for name, value in output.items()} for output in outputs]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="passes over 64 pictures (2)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where to train (cpu)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    size: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64}
    distiller = CrossHeadDistiller(fcos_resnet50_fpn(**size), fcos_resnet50_fpn(**size)).to(options.device)
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(Rectangles(64, seed=1), 4, shuffle=True, collate_fn=collate)
    for epoch in range(options.epochs):
        history = train_one_epoch(distiller, optimizer, loader, options.device, warmup=0 if epoch else 8)
        print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in history[-1].items()))
    found = evaluate(distiller, DataLoader(Rectangles(16, seed=2), 4, collate_fn=collate), options.device)
    print(f"{sum(len(detection['scores']) for detection in found)} detections in {len(found)} pictures")


if __name__ == "__main__":
    main()
