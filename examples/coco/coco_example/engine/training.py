"""The training loop: steps and checkpoints, whatever is trained and wherever it comes from."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coco_example.data.dataset import Target
from coco_example.data.reader import CocoIndex
from coco_example.engine.checkpoints import load_checkpoint, misfit, save_checkpoint
from coco_example.engine.distributed import Worker
from coco_example.engine.loading import TrainingData
from coco_example.engine.loss_checks import LossChecks, check_weights
from coco_example.engine.metrics_log import MetricsLog
from coco_example.engine.optimization import Optimization
from coco_example.engine.randomness import random_state, set_random_state
from coco_example.engine.run_folder import check_processes
from coco_example.engine.signals import Signals
from coco_example.engine.validation import ValidationLosses
from coco_example.options import MethodOptions, Options
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
        validation: Computes losses on other images at every evaluation.
        unlabelled: Images without labels, a share of every step.
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
        validation: ValidationLosses | None = None,
        unlabelled: CocoIndex | None = None,
    ) -> None:
        self.options, self.folder, self.method, self.model, self.worker = options, folder, method, model, worker
        self.run, self.frozen = run, nn.ModuleList(frozen)

        # 1. Images.
        loop = options.training
        self.data = TrainingData(options, index, worker, unlabelled)
        self.total_steps = self.data.steps_per_epoch * loop.epochs

        # 2. What every step moves.
        self.step = 0
        self.seconds = 0.0
        self.optimization = Optimization(method, model, loop, self.total_steps, worker.device)

        # 3. What watches.
        self.check = LossChecks([record.id for record in index.records])
        self.validation = validation
        self.module = worker.distribute(method)

    @property
    def result(self) -> nn.Module:
        """The network to evaluate and save: the average of its weights if there is one."""
        average = self.optimization.average
        return self.model if average is None else average.module

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
            while True:
                losses, targets = self._train_on(batches)
                self.step += 1
                self.seconds = time.perf_counter() - begun
                signals.place = f"at step {self.step}"
                stop = self._log_and_save(log, losses, targets, signals)
                if stop or self.step >= self.total_steps:
                    return
                with signals.released():
                    self._evaluate(log, score)

    def _log_and_save(
        self, log: MetricsLog, losses: dict[str, Tensor], targets: list[Target | None], signals: Signals
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
        if self.worker.first_does(lambda: log.has("eval", self.step)):
            return
        self.worker.share(self.result)
        self.validate(log)
        log.evaluation(self.step, self.step / self.data.steps_per_epoch, score(self.result))

    def validate(self, log: MetricsLog) -> None:
        """Log the losses on validation images, of the weights that are trained and not of their average."""
        if self.validation is None or self.worker.first_does(lambda: log.has("validation", self.step)):
            return
        self.worker.share(self.method)
        fade_distillation(self.method, self.options.method, self.step / max(1, self.total_steps))
        with self.optimization.autocast():
            losses = self.validation(self.method)
        log.validation(self.step, self.step / self.data.steps_per_epoch, losses, self.validation.images)

    def _train_on(
        self, batches: Iterator[tuple[list[Tensor], list[Target | None]]]
    ) -> tuple[dict[str, Tensor], list[Target | None]]:
        """Take one step on the next ``accumulate`` batches; return their mean losses and all their targets."""
        fade_distillation(self.method, self.options.method, self.step / self.total_steps)
        count = self.options.training.accumulate
        means: dict[str, Tensor] = {}
        seen: list[Target | None] = []
        for n in range(count):
            # 1. The losses of a batch, as parts of the mean.
            images, targets = next(batches)
            last = n == count - 1
            with nullcontext() if last else _alone(self.module):
                with self.optimization.autocast():
                    losses = {name: loss / count for name, loss in self.module(images, targets).items()}
                # 2. Its gradients, which add up.
                if not last:
                    self.optimization.backward(losses)
            means = {name: loss.detach() + means.get(name, 0) for name, loss in losses.items()}
            seen += targets
        self._update(losses)
        return means, seen

    def _update(self, losses: dict[str, Tensor]) -> None:
        self.optimization.backward(losses)
        self.optimization.update()

    def _log(self, log: MetricsLog, losses: dict[str, Tensor], targets: list[Target | None], *, check: bool) -> None:
        log.tick()
        # Reading a loss waits for an accelerator; on a CPU it is free, and every step is checked.
        wanted = log.wants(self.step)
        if not (wanted or check or self.worker.device.type == "cpu"):
            return
        values = self.check(losses, targets, self.step)
        if wanted:
            # The scheduler is at the next step already.
            rate = self.options.training.lr * self.optimization.rate(self.step - 1)
            log.step(self.step, values, epoch=self.step / self.data.steps_per_epoch, lr=rate)

    def release(self) -> None:
        """Let go of the wrapper that talks to other processes; one that outlives its group can abort at exit."""
        self.module = self.method
        gc.collect()

    def budget(self) -> dict[str, float]:
        """Count what this run has cost, its teacher's training not included."""
        options = self.options.training
        images = self.step * options.batch_size * options.accumulate * self.worker.count
        spent = {"epochs": options.epochs, "images": images, "seconds": round(self.seconds, 1)}
        if self.data.unlabelled is None:
            return spent
        count = self.data.unlabelled_per_batch * options.accumulate
        return {**spent, "images_unlabelled": self.step * count * self.worker.count}

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on.

        Raises:
            NonFiniteLossError: A weight is not finite, as after a finite loss with a gradient that is not.
        """
        check_weights(self.method, self.step)
        random = self.worker.gather(random_state(self.worker.device))
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
        check_processes(len(states), self.worker.count, self.folder, self.options)

        # 3. Parts and random numbers.
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        # One more process than before has drawn nothing yet; images and their order do not depend on this state.
        if self.worker.rank < len(states):
            set_random_state(states[self.worker.rank], self.worker.device)

    def _wrong(self, state: dict[str, Any]) -> str | None:
        """Describe why a state is no checkpoint of this run; None if it is one."""
        if self.run is not None and state.get("run", self.run) != self.run:
            return "it is another run's"
        own: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        return misfit(own, state, total_steps=self.total_steps, random=random_state(self.worker.device))

    def _parts(self) -> dict[str, Any]:
        """Name the parts whose state is in a checkpoint."""
        return {"method": self.method, **self.optimization.parts()}


def _alone(module: nn.Module) -> AbstractContextManager[Any]:
    """Let gradients add up on this process, to be exchanged with others once a step."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def fade_distillation(method: nn.Module, options: MethodOptions, done: float) -> None:
    """Give distillation the weight it has after a share of the run."""
    if isinstance(method, Distiller):
        method.distillation_weight = fade(done, warmup=options.distill_warmup, decay=options.distill_decay)
