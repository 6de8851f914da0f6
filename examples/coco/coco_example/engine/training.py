"""The training loop: steps and checkpoints, whatever is trained and wherever it comes from."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from coco_example.data.dataset import Target
from coco_example.data.reader import CocoIndex
from coco_example.engine.checkpoints import load_checkpoint, misfit, save_checkpoint
from coco_example.engine.distributed import Worker
from coco_example.engine.loading import TrainingData
from coco_example.engine.loss_checks import DIVERGED, LossChecks
from coco_example.engine.metrics_log import MetricsLog
from coco_example.engine.optimization import build_optimizer, ramped_average, relative_rate
from coco_example.engine.run_folder import same_step
from coco_example.engine.signals import Signals
from coco_example.errors import NonFiniteLossError, RunError
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
        run: Id of the run, which its checkpoints have; None of a run of an earlier version.
        frozen: Parts of the detector that do not learn, whose batch norm stays in evaluation mode.
    """

    def __init__(
        self,
        options: Options,
        folder: Path,
        method: nn.Module,
        model: nn.Module,
        index: CocoIndex,
        worker: Worker,
        run: str | None = None,
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        self.options, self.folder, self.method, self.model, self.worker = options, folder, method, model, worker
        self.run, self.frozen = run, nn.ModuleList(frozen)

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

    def fit(self, log: MetricsLog, score: Callable[[nn.Module], Mapping[str, float]], signals: Signals) -> None:
        """Train to the last step, saving, logging and scoring the detector on the way.

        A signal stops training at the end of a step, which is saved, and an evaluation at once.

        Raises:
            NonFiniteLossError: Training diverged.
            DeadLossError: A loss term stays exactly 0.
            Interrupted: A signal stopped it; it is saved.
        """
        # 1. An evaluation that was due when an earlier part of the run ended.
        signals.place = f"at step {self.step}"
        self._evaluate(log, score)
        if self.step >= self.total_steps:
            return

        # 2. Steps.
        self.method.train()
        self.frozen.eval()
        begun = time.perf_counter() - self.seconds
        with signals.held(), self.data.batches(self.step) as batches:
            for images, targets in batches:
                losses = self._losses(images, targets)
                self._update(losses)
                self.step += 1
                self.seconds = time.perf_counter() - begun
                signals.place = f"at step {self.step}"
                stop = self._log_and_save(log, losses, targets, signals)
                if stop or self.step >= self.total_steps:
                    return
                with signals.released():
                    self._evaluate(log, score)

    def _log_and_save(
        self, log: MetricsLog, losses: dict[str, Tensor], targets: list[Target], signals: Signals
    ) -> bool:
        """Finish a step; return whether a signal came to any process, so that all stop at the same step."""
        every = self.options.training.save_every
        signals.number = self.worker.largest(signals.number)
        epoch_ends = self.step % self.data.steps_per_epoch == 0
        save = epoch_ends or signals.number > 0 or (every > 0 and self.step % every == 0)
        self._log(log, losses, targets, check=save)
        if save:
            self.save()
        return signals.number > 0

    def _evaluate(self, log: MetricsLog, score: Callable[[nn.Module], Mapping[str, float]]) -> None:
        """Score the detector if that is due, once; the last evaluation comes after training."""
        every = self.options.training.eval_every * self.data.steps_per_epoch
        if every == 0 or self.step % every or not 0 < self.step < self.total_steps:
            return
        if self.worker.first_does(lambda: log.has_evaluation(self.step)):
            return
        self.worker.share(self.result)
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
        if self.worker.first:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            state |= {"step": self.step, "seconds": self.seconds, "random": random}
            save_checkpoint(self.folder, state if self.run is None else {**state, "run": self.run})
        self.worker.wait()

    def resume(self) -> None:
        """Continue from the newest checkpoint in the folder that is whole and belongs to this run.

        Raises:
            RunError: There is none, or its steps have more or fewer images.
        """
        # 1. The first process sets aside what is damaged, so that all take the same.
        chosen: dict[str, Any] = {}
        self.worker.first_does(lambda: chosen.update(load_checkpoint(self.folder, self._wrong)))
        state = chosen or load_checkpoint(self.folder)

        # 2. The same number of processes, or steps of as many images.
        states = state["random"]
        _check_processes(len(states), self.worker.count, self.folder, self.options)

        # 3. Parts and random numbers.
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        # One more process than before has drawn nothing yet; images and their order do not depend on this state.
        if self.worker.rank < len(states):
            _set_random_state(states[self.worker.rank], self.worker.device)

    def _wrong(self, state: dict[str, Any]) -> str | None:
        """Describe why a state is no checkpoint of this run; None if it is one."""
        if self.run is not None and state.get("run", self.run) != self.run:
            return "it is another run's"
        own: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        return misfit(own, state, total_steps=self.total_steps, random=_random_state(self.worker.device))

    def _parts(self) -> dict[str, Any]:
        """Name the parts whose state is in a checkpoint."""
        parts: dict[str, Any] = {
            "method": self.method,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }
        return parts if self.average is None else {**parts, "average": self.average}


def _check_processes(then: int, now: int, folder: Path, options: Options) -> None:
    if then != now and not same_step(folder, options, now):
        raise RunError(
            expected=f"{then} processes, as the run was started with",
            got=f"{now}",
            where=f"{folder}",
            fix="resume with as many, or change --batch-size so that a step has as many images as before",
        )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
