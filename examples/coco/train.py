"""Train a detector on a COCO folder: one arm, one folder, resumable at every step.

python examples/coco/train.py --arm one-to-many --data demo --output runs/demo/teacher
python examples/coco/train.py --arm cross-head --data demo --teacher runs/demo/teacher --output runs/demo/student
torchrun --nproc-per-node 8 examples/coco/train.py …
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arms import METRICS, Arm, build_arm, needs_teacher
from coco_data import CocoDataset
from coco_reader import CocoIndex, locate_split, read_coco
from evaluate import Evaluation, evaluate, table
from logbook import Logbook
from models import build_detector
from options import Options, parse_options
from pictures import draw_predictions
from processes import Interrupted, Ranks, processes
from report import draw_report
from runs import (
    ModelSpec,
    RunError,
    check_folder,
    environment,
    load_checkpoint,
    read_json,
    save_model,
    write_json,
)
from scenes import write_scenes
from teachers import TeacherInTraining, load_teacher
from torch import nn
from training import DeadLossError, NonFiniteLossError, Training

from crosskd_assign import Target, adapt, inherit

__all__ = ["run"]

PREFLIGHT_IMAGES = 64


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
    with processes() as ranks:
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
            try:
                training.fit(log, lambda arm: _flat(_score(arm, val_index, options)))
            finally:
                training.release()
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
        short_side=options.short_side,
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
        options.short_side,
    )
    teacher: nn.Module | None = None
    teacher_arm: Arm | None = None
    if options.teacher and (needs_teacher(options.arm) or options.inherit):  # type: ignore[arg-type]
        teacher, labels = load_teacher(options.teacher, size=options.size, short_side=options.short_side)
        teacher.to(ranks.device)
        teacher_arm = Arm(teacher, adapt(teacher), one_to_many=True)
        if ranks.first and not options.resume:
            _preflight(TeacherInTraining(adapt(teacher), adapt(student).eval()), val, labels, options)
        if labels != spec.label_to_category:
            teacher_arm = None  # its labels mean other classes; it can teach but not be drawn beside the student
    origin = teacher if options.inherit else None
    if options.inherit_from:
        origin, _ = load_teacher(options.inherit_from, size=options.size, short_side=options.short_side)
    if origin is not None:
        report = inherit(student, origin)
        if ranks.first:
            print(f"{report}", file=sys.stderr)
    arm = build_arm(
        options.arm,  # type: ignore[arg-type]  # checked by argparse
        student.to(ranks.device),
        teacher,
        metric=options.metric,
        classification_weight=options.distill_classification,
        box_weight=options.distill_box,
        quality_weight=options.distill_quality,
        feature_weight=options.distill_features,
        imitation_weight=options.imitation,
        alignment=options.alignment,  # type: ignore[arg-type]  # checked by argparse
        ranking_weight=options.ranking,
        auxiliary_head=options.auxiliary_head,
        detach=options.detach,
        entry=options.entry,
    ).to(ranks.device)
    if options.channels_last:
        arm.to(memory_format=torch.channels_last)
    return arm, spec, teacher_arm


def _preflight(teacher: TeacherInTraining, val: CocoIndex, labels: dict[int, int], options: Options) -> None:
    """Refuse a teacher that detects nothing: wrong weights, labels or normalisation would waste the whole run."""
    scores = evaluate(teacher, val, label_to_category=labels, limit=PREFLIGHT_IMAGES, batch_size=options.batch_size)
    print(f"teacher on {scores.images} validation images: AP {100 * scores.nms.ap:.1f} with NMS", file=sys.stderr)
    if not scores.nms.ap >= options.teacher_floor:
        raise RunError(
            f"Expected a teacher with an AP of at least {options.teacher_floor}, but got {scores.nms.ap:.4f} on "
            f"{scores.images} validation images ({options.teacher}). Fix: check that it was trained to the end, on "
            "these classes and at this size; or lower --teacher-floor."
        )


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    options = parse_options(arguments)
    try:
        scores = run(options)
    except (ValueError, NonFiniteLossError, DeadLossError) as error:  # what the user can mend, in one sentence
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
