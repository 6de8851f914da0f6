"""The training loop: steps and checkpoints; it knows nothing of where detectors come from."""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arms import Arm
from coco_data import CocoDataset, ResumableSampler, augmentation, collate
from coco_reader import CocoIndex
from evaluate import leave_signals_alone
from logbook import Logbook
from options import Options
from processes import Interrupted, Ranks, any_rank, caught_signals
from runs import RunError, save_checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from crosskd_assign import adapt

__all__ = ["DeadLossError", "NonFiniteLossError", "Training"]


DEAD_CHECKS = 50


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; nothing was saved after the last good checkpoint."""


class DeadLossError(RuntimeError):
    """A loss term has been exactly 0 for many steps: something is not connected."""


class Training:
    """The moving parts of a run and their state."""

    def __init__(self, options: Options, folder: Path, arm: Arm, index: CocoIndex, ranks: Ranks) -> None:
        self.options, self.folder, self.arm, self.ranks = options, folder, arm, ranks
        self.dataset = CocoDataset(
            index,
            augmentation(options.size, options.augmentation, options.short_side),  # type: ignore[arg-type]  # checked by argparse
            seed=options.seed,
            cache=options.cache,
            mosaic=options.mosaic,
        )
        sampler = ResumableSampler(len(self.dataset), options.batch_size, world_size=ranks.count)
        self.steps_per_epoch = sampler.batches_per_epoch
        self.total_steps = self.steps_per_epoch * options.epochs
        self.step = 0
        self.seconds = 0.0
        self.dead: Counter[str] = Counter()  # checks in a row at which a term was exactly 0
        self.optimizer = _optimizer(arm, options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=options.precision == "float16")
        self.average: AveragedModel | None = None
        if options.ema > 0:
            self.average = AveragedModel(arm.adapter.model, multi_avg_fn=_ramped_average(options.ema), use_buffers=True)
        self.module: nn.Module = arm
        if ranks.count > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.module = DistributedDataParallel(arm, device_ids=ids)

    def _rate(self, step: int) -> float:
        """Learning rate at a step, relative to the peak."""
        warm = min(1.0, (step + 1) / max(1, self.options.warmup_steps))
        done = step / max(1, self.total_steps)
        if self.options.schedule == "cosine":
            return warm * (0.5 * (1 + math.cos(math.pi * done)) * 0.99 + 0.01)
        return warm * (1.0 if done < 2 / 3 else 0.1 if done < 8 / 9 else 0.01)

    def _distillation(self, step: int) -> float:
        """Weight of distillation at a step, relative to its peak; it never ends at 0, which would look like a fault."""
        done = step / max(1, self.total_steps)
        warm = min(1.0, done / self.options.distill_warmup) if self.options.distill_warmup > 0 else 1.0
        left = {"none": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return warm * max(0.01, left[self.options.distill_decay])

    def batches(self) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
        """Endless batches from the current step on."""
        options, device = self.options, self.ranks.device
        sampler = ResumableSampler(
            len(self.dataset),
            options.batch_size,
            seed=options.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.count,
            start_batch=self.step,
        )
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=options.workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_alone,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # a loader without its own would draw from the generator that is resumed
        )
        for images, targets in loader:
            moved = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
            yield [image.to(device, non_blocking=True) for image in images], moved

    def fit(self, log: Logbook, score: Callable[[Arm], Mapping[str, float]]) -> None:
        """Train to the last step, saving, logging and scoring the detector on the way."""
        options = self.options
        precision = getattr(torch, options.precision)
        self.arm.train()
        with caught_signals() as signals:
            begun = time.perf_counter() - self.seconds
            batches = self.batches() if self.step < self.total_steps else iter(())
            for images, targets in batches:
                self.arm.scale_distillation(self._distillation(self.step))
                with torch.autocast(self.ranks.device.type, precision) if self._autocasts else nullcontext():
                    losses: dict[str, Tensor] = self.module(images, targets)
                self._update(losses)
                self.step += 1
                self.seconds = time.perf_counter() - begun
                epoch_ends = self.step % self.steps_per_epoch == 0
                stop = any_rank(signals.number, self.ranks)
                save = epoch_ends or stop or (options.save_every and self.step % options.save_every == 0)
                self._log(log, losses, targets, check=bool(save))
                if save:
                    self.save()
                if stop:
                    resume = f"train.py … --output {options.output} --resume"
                    raise Interrupted(stop, f"stopped at step {self.step}; go on with: {resume}")
                if self.step >= self.total_steps:
                    return
                due = options.eval_every and self.step % (options.eval_every * self.steps_per_epoch) == 0
                if due and self.ranks.first:
                    scores = score(self.averaged_arm())
                    self.arm.train()
                    log.evaluation(self.step, self.step / self.steps_per_epoch, scores)

    @property
    def _autocasts(self) -> bool:
        return self.options.precision != "float32"

    def _update(self, losses: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.stack(list(losses.values())).sum()
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.options.max_grad_norm > 0:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.arm.adapter.model)

    def _log(self, log: Logbook, losses: dict[str, Tensor], targets: list[dict[str, Tensor]], *, check: bool) -> None:
        log.tick()
        # Reading a loss waits for an accelerator; on a CPU it is free, and every step is checked.
        wanted = log.wants(self.step)
        if not (wanted or check or self.ranks.device.type == "cpu"):
            return
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            images = [int(target["image_id"]) for target in targets]
            raise NonFiniteLossError(
                f"Expected finite losses, but got {values} (step {self.step}, images {images}). Fix: lower --lr, clip "
                f"harder with --max-grad-norm, or train in --precision bfloat16; the last checkpoint is good."
            )
        self._check_alive(values, targets)
        if wanted:
            rate = self.options.lr * self._rate(self.step - 1)  # the scheduler is at the next step already
            log.step(self.step, values, epoch=self.step / self.steps_per_epoch, lr=rate)

    def _check_alive(self, values: Mapping[str, float], targets: list[dict[str, Tensor]]) -> None:
        """Refuse a term that stays exactly 0 although there are objects, as one that lost its way under DDP does."""
        if all(len(target["boxes"]) == 0 for target in targets):
            return
        for name, value in values.items():
            self.dead[name] = self.dead[name] + 1 if value == 0 else 0
            if self.dead[name] >= DEAD_CHECKS:
                raise DeadLossError(
                    f"Expected every loss term to be alive, but got exactly 0 at {DEAD_CHECKS} checks in a row "
                    f"({name}, step {self.step}). Fix: see that its weight is not 0, and that teacher and student are "
                    "not the same."
                )

    def release(self) -> None:
        """Let go of the wrapper that talks to other processes; one that outlives its group can abort at exit."""
        if self.ranks.count > 1:
            self.module = self.arm
            gc.collect()

    def averaged_arm(self) -> Arm:
        """The detector to evaluate: the average if there is one."""
        model = self.arm.adapter.model if self.average is None else self.average.module
        return Arm(model, adapt(model), one_to_many=self.arm.one_to_many)

    def budget(self) -> dict[str, float]:
        """What this run has cost, its teacher's training not included."""
        images = self.step * self.options.batch_size * self.ranks.count
        return {"epochs": self.options.epochs, "images": images, "seconds": round(self.seconds, 1)}

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on.

        Raises:
            NonFiniteLossError: A weight is not finite, as after a finite loss with a gradient that is not.
        """
        if not torch.stack([value.isfinite().all() for value in self.arm.state_dict().values()]).all():
            raise NonFiniteLossError(
                f"Expected finite weights, but got NaN or infinity (step {self.step}). Fix: lower --lr, clip harder "
                "with --max-grad-norm, or train in --precision bfloat16; the last checkpoint is good."
            )
        states: list[Any] = [None] * self.ranks.count
        mine = {"cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        if self.ranks.count > 1:
            dist.all_gather_object(states, mine)
        else:
            states = [mine]
        if not self.ranks.first:
            return
        save_checkpoint(
            self.folder,
            {
                "arm": self.arm.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "random": states,
            },
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            RunError: It belongs to another model, or to a run on more or fewer processes.
        """
        if len(state["random"]) != self.ranks.count:
            raise RunError(
                f"Expected {len(state['random'])} processes, as the run was started with, but got {self.ranks.count} "
                f"({self.folder}). Fix: resume with as many, because its steps and schedule depend on them."
            )
        try:
            self.arm.load_state_dict(state["arm"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise RunError(
                f"Expected the checkpoint of this model, but got another ({self.folder}): {error}. Fix: resume with "
                "the options the run was started with."
            ) from error
        self.step, self.seconds = state["step"], state["seconds"]
        mine = state["random"][self.ranks.rank]
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], self.ranks.device)


def _optimizer(arm: Arm, options: Options) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in arm.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr)
    return torch.optim.SGD(groups, lr=options.lr, momentum=0.9)


def _ramped_average(decay: float) -> Any:
    """An exponential average that forgets its first steps, when weights still move fast."""

    def average(averaged: Any, current: Any, count: Any) -> None:
        steps = int(count)
        one_step = get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))  # type: ignore[no-untyped-call]
        one_step(averaged, current, count)

    return average
