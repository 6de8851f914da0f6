"""Train a detector on a COCO folder: one arm, one folder, resumable at every step.

python examples/coco/train.py --arm one-to-many --data demo --output runs/demo/teacher
python examples/coco/train.py --arm cross-head --data demo --teacher runs/demo/teacher --output runs/demo/student
torchrun --nproc-per-node 8 examples/coco/train.py …
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from arms import METRICS, Arm, build_arm, needs_teacher
from coco_data import CocoDataset, ResumableSampler, augmentation, collate
from coco_reader import CocoIndex, locate_split, read_coco
from evaluate import Evaluation, evaluate, leave_signals_alone, table
from logbook import Logbook
from models import build_detector, torchvision_detector
from options import Options, parse_options
from pictures import draw_predictions
from report import draw_report
from runs import (
    ModelSpec,
    RunError,
    check_folder,
    environment,
    load_checkpoint,
    load_model,
    read_json,
    save_checkpoint,
    save_model,
    write_json,
)
from scenes import write_scenes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from crosskd_assign import Target, adapt, inherit

__all__ = ["Interrupted", "NonFiniteLossError", "run"]

PREFLIGHT_IMAGES = 64


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; nothing was saved after the last good checkpoint."""


class Interrupted(RuntimeError):  # noqa: N818  # not an error: the run was saved and can go on
    """SIGINT or SIGTERM came; the run was saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0


def run(options: Options) -> Evaluation | None:
    """Train, evaluate, save and draw one run.

    Returns:
        The final scores on rank 0, None on others.

    Raises:
        ValueError: Whatever is wrong with options, data, models or folders, as one of its subclasses.
        NonFiniteLossError: Training diverged.
        Interrupted: A signal stopped it; it is saved.
    """
    folder = Path(options.output)
    with _processes() as ranks:
        state = _earlier_state(folder, options)
        train_index, val_index = _data(options, ranks)
        # Weights are drawn from the seed alone; what is drawn later depends on the rank, too.
        torch.manual_seed(options.seed)
        torch.use_deterministic_algorithms(options.deterministic)
        arm, spec, teacher = _models(options, train_index, val_index, ranks)
        if ranks.first and state is None:  # only now: a refused teacher must not leave a folder that looks in use
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", asdict(options))
            write_json(folder / "environment.json", environment())
        torch.manual_seed(options.seed + 1 + ranks.rank)
        training = Training(options, folder, arm, train_index, ranks)
        if state is not None:
            training.load(state)
        with Logbook(
            folder,
            total_steps=training.total_steps,
            start_step=training.step,
            batch_size=options.batch_size * ranks.count,
            enabled=ranks.first,
            interval=options.log_every,
        ) as log:
            if training.step == 0 and ranks.first:
                log.message(f"data: {train_index.report}")
                _draw_first_batch(folder, training)
            training.fit(log, val_index)
            if not ranks.first:
                return None
            final = training.averaged_arm()
            scores = _score(final, val_index, options)
            log.evaluation(training.step, options.epochs, _flat(scores))
        save_model(folder, final.adapter.model, spec)
        summary = {"arm": options.arm, "seed": options.seed, "scores": scores.as_dict(), "budget": training.budget()}
        write_json(folder / "summary.json", {**summary, "options": asdict(options), "environment": environment()})
        names, assigner = spec.label_to_name, METRICS[options.metric]
        draw_report(folder, final.eval(), CocoDataset(val_index), names, teacher, assigner=assigner)
        return scores


class Training:
    """The moving parts of a run and their state."""

    def __init__(self, options: Options, folder: Path, arm: Arm, index: CocoIndex, ranks: Ranks) -> None:
        self.options, self.folder, self.arm, self.ranks = options, folder, arm, ranks
        self.dataset = CocoDataset(
            index,
            augmentation(options.size, options.augmentation),  # type: ignore[arg-type]  # checked by argparse
            seed=options.seed,
            cache=options.cache,
            mosaic=options.mosaic,
        )
        sampler = ResumableSampler(len(self.dataset), options.batch_size, world_size=ranks.count)
        self.steps_per_epoch = sampler.batches_per_epoch
        self.total_steps = self.steps_per_epoch * options.epochs
        self.step = 0
        self.seconds = 0.0
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

    def fit(self, log: Logbook, val_index: CocoIndex) -> None:
        """Train to the last step, saving, logging and evaluating on the way."""
        options = self.options
        precision = getattr(torch, options.precision)
        self.arm.train()
        with _signals() as signals:
            begun = time.perf_counter() - self.seconds
            batches = self.batches() if self.step < self.total_steps else iter(())
            for images, targets in batches:
                with torch.autocast(self.ranks.device.type, precision) if self._autocasts else nullcontext():
                    losses: dict[str, Tensor] = self.module(images, targets)
                self._update(losses)
                self.step += 1
                self.seconds = time.perf_counter() - begun
                epoch_ends = self.step % self.steps_per_epoch == 0
                stop = _any_rank(signals.number, self.ranks)
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
                    scores = _score(self.averaged_arm(), val_index, options)
                    self.arm.train()
                    log.evaluation(self.step, self.step / self.steps_per_epoch, _flat(scores))

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
        if wanted:
            rate = self.options.lr * self._rate(self.step - 1)  # the scheduler is at the next step already
            log.step(self.step, values, epoch=self.step / self.steps_per_epoch, lr=rate)

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


def _data(options: Options, ranks: Ranks) -> tuple[CocoIndex, CocoIndex]:
    root = Path(options.data_path)
    if options.data == "demo" and ranks.first:
        write_scenes(root)
    if ranks.count > 1:
        dist.barrier()
    train = read_coco(*locate_split(root, "train", options.train_annotations or None))
    return train, read_coco(*locate_split(root, "val", options.val_annotations or None))


def _earlier_state(folder: Path, options: Options) -> dict[str, Any] | None:
    """The checkpoint to resume from; None for a new run."""
    check_folder(folder, resume=options.resume)
    if not options.resume:
        return None
    differences = options.differences(read_json(folder / "config.json"))
    if differences:
        raise RunError(
            f"Expected the options the run was started with, but got others ({folder}): {'; '.join(differences)}. Fix: "
            "repeat them, or start a new run."
        )
    return load_checkpoint(folder)


def _models(options: Options, train: CocoIndex, val: CocoIndex, ranks: Ranks) -> tuple[Arm, ModelSpec, Arm | None]:
    """The arm to train, what its detector is, and the teacher as a detector if its labels are the same."""
    student = build_detector(
        options.architecture,  # type: ignore[arg-type]  # checked by argparse
        options.backbone,  # type: ignore[arg-type]  # checked by argparse
        train.num_classes,
        size=options.size,
        backbone_weights=options.backbone_weights or None,
        trainable_stages=None if options.trainable_stages < 0 else options.trainable_stages,
        channels=options.channels,
        head_convs=options.head_convs,
    )
    one_to_many = options.arm == "one-to-many"
    categories = tuple((category.id, category.name) for category in train.categories)
    spec = ModelSpec(
        options.architecture,
        options.backbone,
        options.size,
        options.channels,
        options.head_convs,
        one_to_many,
        categories,
    )
    teacher: nn.Module | None = None
    teacher_arm: Arm | None = None
    if options.teacher and (needs_teacher(options.arm) or options.inherit):  # type: ignore[arg-type]
        teacher, labels = _teacher(options)
        teacher.to(ranks.device)
        teacher_arm = Arm(teacher, adapt(teacher), one_to_many=True)
        if ranks.first and not options.resume:
            _preflight(teacher_arm, val, labels, options)
        if options.inherit:
            report = inherit(student, teacher)
            if ranks.first:
                print(f"{report}", file=sys.stderr)
        if labels != spec.label_to_category:
            teacher_arm = None  # its labels mean other classes; it can teach but not be drawn beside the student
    arm = build_arm(
        options.arm,  # type: ignore[arg-type]  # checked by argparse
        student.to(ranks.device),
        teacher,
        metric=options.metric,
        classification_weight=options.distill_classification,
        box_weight=options.distill_box,
        quality_weight=options.distill_quality,
        imitation_weight=options.imitation,
        alignment=options.alignment,  # type: ignore[arg-type]  # checked by argparse
    ).to(ranks.device)
    if options.channels_last:
        arm.to(memory_format=torch.channels_last)
    return arm, spec, teacher_arm


def _teacher(options: Options) -> tuple[nn.Module, dict[int, int]]:
    """The teacher and the COCO category of each of its labels."""
    kind, _, name = options.teacher.partition(":")
    if kind == "torchvision" and name:
        return torchvision_detector(name, size=options.size), {category: category for category in range(1, 91)}
    model, spec = load_model(Path(options.teacher))
    if not spec.one_to_many:
        raise RunError(
            f"Expected a one-to-many teacher, but got a one-to-one detector ({options.teacher}). Fix: train it with "
            "--arm one-to-many."
        )
    return model, spec.label_to_category


def _preflight(teacher: Arm, val: CocoIndex, labels: dict[int, int], options: Options) -> None:
    """Refuse a teacher that detects nothing: wrong weights, labels or normalisation would waste the whole run."""
    scores = evaluate(teacher, val, label_to_category=labels, limit=PREFLIGHT_IMAGES, batch_size=options.batch_size)
    print(f"teacher on {scores.images} validation images: AP {100 * scores.nms.ap:.1f} with NMS", file=sys.stderr)
    if not scores.nms.ap >= options.teacher_floor:
        raise RunError(
            f"Expected a teacher with an AP of at least {options.teacher_floor}, but got {scores.nms.ap:.4f} on "
            f"{scores.images} validation images ({options.teacher}). Fix: check that it was trained to the end, on "
            "these classes and at this size; or lower --teacher-floor."
        )


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


def _score(arm: Arm, index: CocoIndex, options: Options) -> Evaluation:
    return evaluate(arm, index, batch_size=options.batch_size, workers=options.workers)


def _flat(scores: Evaluation) -> dict[str, float]:
    values = scores.as_dict()
    return {name: values[name] for name in ("ap", "ap_nms", "ap50", "ap50_nms", "duplicates", "duplicates_nms")}


def _draw_first_batch(folder: Path, training: Training) -> None:
    """What augmentation really does, before any time is spent on it."""
    samples = [training.dataset[(0, i)] for i in range(min(4, len(training.dataset)))]
    names = {label: c.name for label, c in enumerate(training.dataset.index.categories, start=1)}
    boxes = [Target(boxes=target["boxes"], labels=target["labels"]) for _, target in samples]
    draw_predictions(folder / "batch0.png", [image for image, _ in samples], [("training image", boxes)], names)


@contextmanager
def _processes() -> Iterator[Ranks]:
    """Joins the processes that torchrun started; a single process otherwise."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if count == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()


class _Signals:
    """The last signal that asked to stop, 0 before."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number


@contextmanager
def _signals() -> Iterator[_Signals]:
    """While training, SIGINT and SIGTERM wait for the end of the step."""
    signals = _Signals()
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_rank(number: int, ranks: Ranks) -> int:
    """The signal that reached any process, so that all stop at the same step."""
    if ranks.count == 1:
        return number
    value = torch.tensor(number, device=ranks.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    options = parse_options(arguments)
    try:
        scores = run(options)
    except (ValueError, NonFiniteLossError) as error:  # what the user can mend, in one sentence
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        return 128 + stop.number
    if scores is not None:
        rows = [("without NMS", scores.plain, scores.duplicates), ("with NMS", scores.nms, scores.duplicates_nms)]
        print(table(rows), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
