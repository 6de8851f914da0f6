"""Make a detector of another package NMS-free on a COCO-format folder: a short run, and the scores it reaches.

python examples/third_party/distill.py --detector yolov8n --data-path bccd --size 192 --teacher-steps 600 --steps 600

First a teacher is trained by its package's own one-to-many loss; nanodet and yolox come with COCO weights instead.
Then a student, a copy of the teacher or a fresh network of its kind, is trained one-to-one with the teacher's help.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "coco"))

from coco_example.data.augmentation import augmentation
from coco_example.data.dataset import CocoDataset, collate
from coco_example.data.layouts import locate_split
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.data.sampler import ResumableSampler
from coco_example.data.values import Identifier
from coco_example.evaluation.evaluation import Detector, evaluate, table

from crosskd_assign import CrossHeadDistiller, DetectorAdapter
from crosskd_assign.structures import Target

__all__ = ["DETECTORS", "TRAINED", "batches", "main", "run", "train"]

# The file of each detector's adapter, options of its `build`, and further ones for the student.
DETECTORS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "effdet": ("effdet_detector", {}, {}),
    "yolov8n": ("ultralytics_detector", {"name": "yolov8n"}, {}),
    "yolo11n": ("ultralytics_detector", {"name": "yolo11n"}, {}),
    "yolo26n": ("ultralytics_detector", {"name": "yolo26n"}, {"branch": "one-to-one"}),
    "ssdlite": ("ssdlite_detector", {}, {}),
}
TRAINED = {"nanodet": "nanodet_m", "yolox": "yolox_nano"}  # functions of nanodet_yolox.py: detector and categories

Batches = Iterator[tuple[list[Tensor], list[Target]]]
Loss = Callable[[Sequence[Tensor], Sequence[Target]], Mapping[str, Tensor]]


def batches(index: CocoIndex, channels: Mapping[int, int], *, size: int, batch_size: int, seed: int = 0) -> Batches:
    """Draw endless batches of flipped images, their longer side ``size`` pixels.

    Args:
        index: Images and boxes.
        channels: Class channel of each of the index's labels: a label of a target is a channel of the logits.
        size: In pixels.
        batch_size: Images of a batch.
        seed: Of order and flips.
    """
    dataset = CocoDataset(index, augmentation(size, "flip"), seed=seed, cache=True)
    sampler = ResumableSampler(len(dataset), batch_size, seed=seed)
    for images, targets in DataLoader(dataset, batch_sampler=sampler, collate_fn=collate):
        labels = [torch.tensor([channels[n] for n in t["labels"].tolist()], dtype=torch.int64) for t in targets]
        yield images, [{"boxes": t["boxes"], "labels": n} for t, n in zip(targets, labels, strict=True)]


def train(module: nn.Module, loss: Loss, data: Batches, *, steps: int, lr: float) -> list[dict[str, float]]:
    """Train in a plain loop with one cycle of the learning rate.

    Args:
        module: The module whose parameters are trained.
        loss: Returns the terms to be summed.
        data: Batches.
        steps: Optimizer steps.
        lr: Peak learning rate of AdamW.

    Returns:
        The terms of every step.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    module.train()
    history: list[dict[str, float]] = []
    for _, (images, targets) in zip(range(steps), data, strict=False):
        losses = loss(images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()
        history.append({name: float(value.detach()) for name, value in losses.items()})
        if len(history) % 50 == 0:
            terms = ", ".join(f"{name} {value:.3f}" for name, value in _mean(history[-50:]).items())
            print(f"step {len(history)}: {terms}", flush=True)
    return history


def _mean(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in history) / len(history) for name in history[0]}


def run(options: argparse.Namespace) -> None:
    """Train a teacher and a student, and print their scores."""
    torch.manual_seed(options.seed)
    index = read_coco(*locate_split(options.data_path, "train", options.train_annotations))
    val = read_coco(*locate_split(options.data_path, "val", options.val_annotations), index.categories)
    teacher, student, categories = _teacher_and_student(options, index)
    channel_of = {category: channel for channel, category in categories.items()}
    channels = {label: channel_of[category] for label, category in index.label_to_category.items()}
    data = batches(index, channels, size=options.size, batch_size=options.batch_size, seed=options.seed)
    if options.detector in DETECTORS:
        own = import_module(DETECTORS[options.detector][0]).own_loss
        train(teacher, lambda *batch: {"own loss": own(teacher, *batch)}, data, steps=options.teacher_steps, lr=1e-3)
    if options.start == "teacher":
        student.model.load_state_dict(teacher.model.state_dict())

    distiller = CrossHeadDistiller(student, teacher)
    distiller.distillation_weight = options.distillation
    history = train(distiller, distiller, data, steps=options.steps, lr=options.lr)

    tenth = max(1, options.steps // 10)
    for name, first in _mean(history[:tenth]).items():
        print(f"{name}: {first:.3f} in the first {tenth} steps, {_mean(history[-tenth:])[name]:.3f} in the last")
    rows = []
    for name, adapter in (("teacher", teacher), ("student", student)):
        scores = evaluate(
            Detector(adapter, "class_quality" if name == "teacher" else "class"), val, label_to_category=categories
        )
        rows += [(f"{name}, without NMS", scores.plain, scores.duplicates)]
        rows += [(f"{name}, with NMS", scores.nms, scores.duplicates_nms)]
    print(table(rows))
    if options.output is not None:
        torch.save(student.model.state_dict(), options.output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = _options(arguments)
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:  # data, weights or a package that is not there
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _teacher_and_student(
    options: argparse.Namespace, index: CocoIndex
) -> tuple[DetectorAdapter, DetectorAdapter, dict[int, Identifier]]:
    """Build two detectors, and list the COCO category of each of their class channels."""
    if options.detector in TRAINED:
        load = getattr(import_module("nanodet_yolox"), TRAINED[options.detector])
        (teacher, categories), (student, _) = load(options.size), load(options.size)
        return teacher, student, categories
    file, settings, more = DETECTORS[options.detector]
    build, classes = import_module(file).build, len(index.categories)
    teacher = build(classes, size=options.size, **settings)
    student = build(classes, size=options.size, **settings, **more)
    return teacher, student, {channel: category.id for channel, category in enumerate(index.categories)}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", required=True, choices=[*DETECTORS, *TRAINED])
    parser.add_argument("--data-path", type=Path, required=True, help="COCO folder")
    parser.add_argument("--train-annotations", default=None, help="file in annotations/ instead of instances_train")
    parser.add_argument("--val-annotations", default=None, help="file in annotations/ instead of instances_val")
    parser.add_argument("--size", type=int, default=192, help="longer side of the images in pixels (192)")
    parser.add_argument("--batch-size", type=int, default=8, help="images of a step (8)")
    parser.add_argument("--teacher-steps", type=int, default=600, help="of one-to-many training (600)")
    parser.add_argument("--steps", type=int, default=600, help="of distillation (600)")
    parser.add_argument(
        "--start",
        choices=["teacher", "fresh"],
        default="teacher",
        help="first weights of the student; nanodet and yolox always have COCO's",
    )
    parser.add_argument(
        "--distillation", type=float, default=1.0, help="weight of the distillation losses; 0: one-to-one alone"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of distillation (0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--output", type=Path, default=None, help="file for the student's state dict")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
