"""The training loop: steps and checkpoints, whatever is trained and wherever it comes from."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from coco_example.data.dataset import Target
from coco_example.data.reader import CocoIndex
from coco_example.engine.distributed import Worker
from coco_example.engine.loading import TrainingData
from coco_example.engine.loss_checks import DIVERGED, LossChecks
from coco_example.engine.metrics_log import MetricsLog
from coco_example.engine.optimization import build_optimizer, ramped_average, relative_rate
from coco_example.engine.run_folder import save_checkpoint
from coco_example.engine.signals import Interrupted, caught_signals
from coco_example.errors import NonFiniteLossError, RunError, first_line
from coco_example.options import Options
from crosskd_assign import Distiller, fade

__all__ = ["Training"]


class Training:
    """The moving parts of a run and their state.

    Args:
        options: The run's.
        folder: Where checkpoints are written.
        method: What is trained: takes images and targets, returns losses.
        model: The detector in it that is evaluated and saved.
        index: Images to train on.
        worker: This process.
    """

    def __init__(
        self, options: Options, folder: Path, method: nn.Module, model: nn.Module, index: CocoIndex, worker: Worker
    ) -> None:
        self.options, self.folder, self.method, self.model, self.worker = options, folder, method, model, worker

        # 1. Images.
        loop = options.training
        self.data = TrainingData(options, index, worker)
        self.total_steps = self.data.steps_per_epoch * loop.epochs

        # 2. What every step moves.
        self.step = 0
        self.seconds = 0.0
        self.rate = partial(relative_rate, total_steps=self.total_steps, options=loop)
        self.optimizer = build_optimizer(method, loop)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.scaler = torch.amp.GradScaler(worker.device.type, enabled=loop.precision == "float16")
        self.average: AveragedModel | None = None
        if loop.ema > 0:
            self.average = AveragedModel(model, multi_avg_fn=ramped_average(loop.ema), use_buffers=True)

        # 3. What watches.
        self.check = LossChecks([record.id for record in index.records])
        self.module = worker.distribute(method)

    @property
    def result(self) -> nn.Module:
        """The network to evaluate and save: the average of its weights if there is one."""
        return self.model if self.average is None else self.average.module

    def fit(self, log: MetricsLog, score: Callable[[nn.Module], Mapping[str, float]]) -> None:
        """Train to the last step, saving, logging and scoring the detector on the way.

        Raises:
            NonFiniteLossError: Training diverged.
            DeadLossError: A loss term stays exactly 0.
            Interrupted: A signal stopped it; it is saved.
        """
        options = self.options.training
        self.method.train()
        with caught_signals() as signals:
            begun = time.perf_counter() - self.seconds
            for images, targets in self.data.batches(self.step) if self.step < self.total_steps else ():
                # 1. One step.
                losses = self._losses(images, targets)
                self._update(losses)
                self.step += 1
                self.seconds = time.perf_counter() - begun

                # 2. Log it and save it.
                stop = self.worker.largest(signals.number)
                epoch_ends = self.step % self.data.steps_per_epoch == 0
                save = epoch_ends or stop or (options.save_every and self.step % options.save_every == 0)
                self._log(log, losses, targets, check=bool(save))
                if save:
                    self.save()

                # 3. Was it the last?
                if stop:
                    resume = f"train.py … --output {self.options.output} --resume"
                    raise Interrupted(stop, f"stopped at step {self.step}; go on with: {resume}")
                if self.step >= self.total_steps:
                    return

                # 4. Score the detector.
                due = options.eval_every and self.step % (options.eval_every * self.data.steps_per_epoch) == 0
                if due and self.worker.first:
                    log.evaluation(self.step, self.step / self.data.steps_per_epoch, score(self.result))

    def _losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        if isinstance(self.method, Distiller):
            done = self.step / max(1, self.total_steps)
            method = self.options.method
            self.method.distillation_weight = fade(done, warmup=method.distill_warmup, decay=method.distill_decay)
        with self._autocast():
            losses: dict[str, Tensor] = self.module(images, targets)
        return losses

    def _autocast(self) -> AbstractContextManager[Any]:
        name = self.options.training.precision
        return nullcontext() if name == "float32" else torch.autocast(self.worker.device.type, getattr(torch, name))

    def _update(self, losses: dict[str, Tensor]) -> None:
        # 1. Gradients of the sum.
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.stack(list(losses.values())).sum()
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.options.training.max_grad_norm > 0:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.options.training.max_grad_norm)

        # 2. Weights, learning rate, average.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _log(self, log: MetricsLog, losses: dict[str, Tensor], targets: list[Target], *, check: bool) -> None:
        log.tick()
        # Reading a loss waits for an accelerator; on a CPU it is free, and every step is checked.
        wanted = log.wants(self.step)
        if not (wanted or check or self.worker.device.type == "cpu"):
            return
        values = self.check(losses, targets, self.step)
        if wanted:
            rate = self.options.training.lr * self.rate(self.step - 1)  # the scheduler is at the next step already
            log.step(self.step, values, epoch=self.step / self.data.steps_per_epoch, lr=rate)

    def release(self) -> None:
        """Let go of the wrapper that talks to other processes; one that outlives its group can abort at exit."""
        self.module = self.method
        gc.collect()

    def budget(self) -> dict[str, float]:
        """Count what this run has cost, its teacher's training not included."""
        options = self.options.training
        images = self.step * options.batch_size * self.worker.count
        return {"epochs": options.epochs, "images": images, "seconds": round(self.seconds, 1)}

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on.

        Raises:
            NonFiniteLossError: A weight is not finite, as after a finite loss with a gradient that is not.
        """
        if not torch.stack([value.isfinite().all() for value in self.method.state_dict().values()]).all():
            raise NonFiniteLossError(
                expected="finite weights", got="NaN or infinity", where=f"step {self.step}", fix=DIVERGED
            )
        random = self.worker.gather(_random_state(self.worker.device))
        if not self.worker.first:
            return
        states = {name: part.state_dict() for name, part in self._parts().items()}
        save_checkpoint(self.folder, {**states, "step": self.step, "seconds": self.seconds, "random": random})

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            RunError: It belongs to another model, or to a run on more or fewer processes.
        """
        # 1. The same number of processes.
        if len(state["random"]) != self.worker.count:
            raise RunError(
                expected=f"{len(state['random'])} processes, as the run was started with",
                got=f"{self.worker.count}",
                where=f"{self.folder}",
                fix="resume with as many, because its steps and schedule depend on them",
            )

        # 2. The same parts.
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise RunError(
                expected="the checkpoint of this model",
                got=f"another: {first_line(error)}",
                where=f"{self.folder}",
                fix="resume with the options the run was started with",
            ) from error

        # 3. The same random numbers.
        self.step, self.seconds = state["step"], state["seconds"]
        _set_random_state(state["random"][self.worker.rank], self.worker.device)

    def _parts(self) -> dict[str, Any]:
        """Name the parts whose state is in a checkpoint."""
        parts: dict[str, Any] = {
            "method": self.method,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }
        return parts if self.average is None else {**parts, "average": self.average}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
