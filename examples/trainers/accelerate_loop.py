"""Distillation with Hugging Face Accelerate: ``accelerate launch examples/trainers/accelerate_loop.py --output runs``.

The distiller is prepared like any model: the teacher follows it to the device, runs under the same autocast, and is in
no file that ``save_state`` writes. To resume, build the distiller as before, teacher and all, then ``load_state``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from rectangles import Rectangles, collate, new_distiller
from torch import nn
from torch.utils.data import DataLoader

from crosskd_assign import Distiller, fade
from crosskd_assign.diagnostics import DuplicateReport, duplicate_report
from crosskd_assign.structures import Detection

__all__ = ["Progress", "evaluate", "main", "train"]


class Progress:
    """How many epochs are done; saved and loaded with the rest of the state."""

    epochs = 0

    def state_dict(self) -> dict[str, int]:
        """Return what is saved."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what was saved."""
        self.epochs = state["epochs"]


def train(
    accelerator: Accelerator, distiller: nn.Module, loader: Any, *, epochs: int, total: int, lr: float = 4e-3
) -> nn.Module:
    """Train up to an epoch, from the newest state in the accelerator's folder, if there is one.

    Args:
        accelerator: Device, precision, processes, accumulation, and the folder of states.
        distiller: Student and teacher.
        loader: Batches of images and targets.
        epochs: Epochs to have done at the end.
        total: Length of the whole run in epochs, over which the teacher's weight falls.
        lr: Learning rate of AdamW.

    Returns:
        The prepared distiller.
    """
    # 1. Everything to its device; the teacher along with the distiller.
    optimizer = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=lr)
    distiller, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
    plain: Distiller = accelerator.unwrap_model(distiller)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if Path(accelerator.project_dir, "checkpoints").is_dir():
        accelerator.load_state()
        accelerator.project_configuration.iteration = progress.epochs  # number of the next state

    # 2. The loop.
    while progress.epochs < epochs:
        loader.set_epoch(progress.epochs)  # another order in every epoch, and the same one after a resume
        for step, (images, targets) in enumerate(loader):
            plain.distillation_weight = fade((progress.epochs + step / len(loader)) / total, decay="cosine")
            with accelerator.accumulate(distiller):
                losses = distiller(images, targets)
                accelerator.backward(torch.stack(list(losses.values())).sum())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(distiller.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()
        progress.epochs += 1
        accelerator.save_state()
    return distiller


def evaluate(accelerator: Accelerator, distiller: nn.Module, data: Rectangles) -> DuplicateReport:
    """Detect without NMS, with the student alone, and count duplicates."""
    detector = accelerator.unwrap_model(distiller).detector.eval()
    with torch.no_grad(), accelerator.autocast():
        detections = detector([image.to(accelerator.device) for image in data.images])
    detector.train()
    on_cpu = [Detection(boxes=d["boxes"].cpu(), scores=d["scores"].cpu(), labels=d["labels"].cpu()) for d in detections]
    return duplicate_report(on_cpu, data.targets)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of states; the newest is gone on from")
    parser.add_argument("--epochs", type=int, default=20, help="passes over 64 pictures (20)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches for a step of the optimizer (1)")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="of autocast (no)")
    options = parser.parse_args(arguments)
    set_seed(0)
    accelerator = Accelerator(
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
        project_config=ProjectConfiguration(f"{options.output}", automatic_checkpoint_naming=True, total_limit=2),
    )
    loader = DataLoader(Rectangles(64, seed=1), 8, shuffle=True, collate_fn=collate)
    distiller = train(accelerator, new_distiller(), loader, epochs=options.epochs, total=options.epochs)
    report = evaluate(accelerator, distiller, Rectangles(16, seed=2))
    accelerator.print(f"found {report.found} of {report.objects}, {report.duplicates} duplicates")


if __name__ == "__main__":
    main()
