"""Distillation as a Lightning module: ``python examples/trainers/lightning_module.py --output runs/lightning``.

The module holds the distiller. Its checkpoints hold the student, the optimizer and the loops, and no teacher:
``DistillationModule.load_from_checkpoint(path, distiller=new_distiller())`` brings the teacher back, because building a
distiller takes one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from rectangles import Rectangles, collate, new_distiller
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from crosskd_assign import Distiller, fade
from crosskd_assign.diagnostics import duplicate_report
from crosskd_assign.structures import Detection, Target

__all__ = ["DistillationModule", "Pictures", "main"]

Sample = tuple[list[Tensor], list[Target]]


class DistillationModule(lightning.LightningModule):  # type: ignore[misc]  # types do not depend on what is installed
    """Trains the student of a distiller, and counts the duplicates that it leaves.

    Args:
        distiller: Student and teacher. Lightning moves the teacher along and never trains it.
        lr: Learning rate of AdamW.
    """

    def __init__(self, distiller: Distiller, *, lr: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["distiller"])  # else the teacher would be pickled into every checkpoint
        self.distiller = distiller
        self.lr = lr
        self.found, self.duplicates = 0, 0

    def forward(self, images: Sequence[Tensor]) -> list[Detection]:
        """Detect without NMS."""
        return self.distiller.detector(images)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def training_step(self, batch: Sample, _: int) -> Tensor:
        """Sum the losses; the teacher's weight falls over the run."""
        progress = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
        self.distiller.distillation_weight = fade(min(1.0, progress), decay="cosine")
        losses: dict[str, Tensor] = self.distiller(*batch)
        self.log_dict(dict(losses), batch_size=len(batch[0]))
        return torch.stack(list(losses.values())).sum()

    def validation_step(self, batch: Sample, _: int) -> None:
        """Count found objects, and the reports beyond the first of each."""
        images, targets = batch
        report = duplicate_report(self(images), targets)
        self.found, self.duplicates = self.found + report.found, self.duplicates + report.duplicates

    def on_validation_epoch_end(self) -> None:
        """Log both, summed over all processes."""
        counts = {"found": float(self.found), "duplicates": float(self.duplicates)}
        self.log_dict(counts, reduce_fx="sum", sync_dist=True, prog_bar=True)
        self.found, self.duplicates = 0, 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize what is not frozen: the student, and what aligns its maps with the teacher's."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Pictures(lightning.LightningDataModule):  # type: ignore[misc]
    """Rectangles in an order that depends on the epoch alone: a resumed run goes on as if it had not stopped."""

    def __init__(self, train: int = 64, val: int = 16, batch_size: int = 8) -> None:
        super().__init__()
        self.train, self.val, self.batch_size = Rectangles(train, seed=1), Rectangles(val, seed=2), batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Target]]:
        """Share the pictures between the processes; Lightning tells this sampler the epoch, also of a resumed run."""
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        order: DistributedSampler[tuple[Tensor, Target]] = DistributedSampler(self.train, processes, rank)
        return DataLoader(self.train, self.batch_size, sampler=order, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Target]]:
        """Keep the order."""
        return DataLoader(self.val, self.batch_size, collate_fn=collate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--epochs", type=int, default=20, help="passes over 64 pictures (20)")
    parser.add_argument("--resume", type=Path, default=None, help="checkpoint to go on from")
    options = parser.parse_args(arguments)
    trainer = lightning.Trainer(
        default_root_dir=options.output,
        max_epochs=options.epochs,
        callbacks=[EMAWeightAveraging(decay=0.9)],  # validates, and saves, the average
        log_every_n_steps=8,
    )
    trainer.fit(DistillationModule(new_distiller()), datamodule=Pictures(), ckpt_path=options.resume)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
