"""Train a detector on a COCO folder: one arm, one folder, resumable at every step.

python examples/coco/train.py --arm one-to-many --data demo --output runs/demo/teacher
python examples/coco/train.py --arm cross-head --data demo --teacher runs/demo/teacher --output runs/demo/student
torchrun --nproc-per-node 8 examples/coco/train.py …
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.preflight import judge_pictures, judge_splits
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.data.scenes import write_scenes
from coco_example.data.values import Identifier
from coco_example.engine.distributed import Worker, join_workers
from coco_example.engine.metrics_log import MetricsLog
from coco_example.engine.run_folder import check_folder, check_options, environment, load_checkpoint
from coco_example.engine.signals import Interrupted
from coco_example.engine.training import Training
from coco_example.errors import RunError
from coco_example.evaluation.evaluation import Detector, Evaluation, evaluate, table
from coco_example.figures.draw import draw_predictions
from coco_example.figures.report import draw_report
from coco_example.files import write_json
from coco_example.models.detectors import build_detector
from coco_example.models.methods import METRICS, build_method, needs_teacher
from coco_example.models.saved_model import ModelSpec, save_model
from coco_example.models.teachers import TeacherInTraining, load_teacher
from coco_example.options import Options, parse_options
from torch import nn

from crosskd_assign import adapt, inherit
from crosskd_assign.detectors.probing import evaluation_mode
from crosskd_assign.errors import CrossKDError
from crosskd_assign.structures import Target

__all__ = ["run"]

PREFLIGHT_IMAGES = 64


def run(options: Options) -> Evaluation | None:
    """Train, evaluate, save and draw one run.

    Returns:
        The final scores on rank 0, None on others.

    Raises:
        CrossKDError: Something is wrong with options, data, models or folders, or training diverged.
        Interrupted: A signal stopped it; it is saved.
    """
    folder, one_to_many = Path(options.output), options.method.arm == "one-to-many"
    with join_workers() as worker:
        # 1. A new folder, or a run to resume.
        check_folder(folder, resume=options.resume)
        if options.resume:
            check_options(folder, options)
        state = load_checkpoint(folder) if options.resume else None

        # 2. Images.
        train, val = _load_data(options, worker)

        # 3. The detector. Its weights are drawn from the seed alone; what is drawn later depends on the rank, too.
        torch.manual_seed(options.seed)
        torch.use_deterministic_algorithms(options.deterministic)
        model = build_detector(options.model, train.num_classes)
        categories = tuple((category.id, category.name) for category in train.categories)
        spec = ModelSpec(options.model, one_to_many, categories)

        # 4. What it learns from, and what it starts with.
        teacher, labels = _load_teacher(options, model, val, worker)
        origin = teacher if options.teachers.inherit else None
        if options.teachers.inherit_from:
            origin, _ = load_teacher(options.teachers.inherit_from, options.model)
        if origin is not None:
            report = inherit(model, origin)
            if worker.first:
                print(f"{report}", file=sys.stderr)

        # 5. How it is trained.
        method = build_method(options.method, model.to(worker.device), teacher).to(worker.device)
        if options.training.channels_last:
            method.to(memory_format=torch.channels_last)

        # 6. The folder: only now, because a refused teacher must not leave one that looks in use.
        if worker.first and state is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", options.as_flat())
            write_json(folder / "environment.json", environment())

        # 7. Train.
        torch.manual_seed(options.seed + 1 + worker.rank)
        training = Training(options, folder, method, model, train, worker)
        if state is not None:
            training.load(state)
        with MetricsLog(
            folder,
            total_steps=training.total_steps,
            start_step=training.step,
            batch_size=options.training.batch_size * worker.count,
            enabled=worker.first,
            interval=options.training.log_every,
        ) as log:
            if training.step == 0 and worker.first:
                log.message(f"data: {train.report}")
                _draw_first_batch(folder, training.data.dataset)
            try:
                training.fit(log, lambda network: _for_log(_score(network, val, options)))
            finally:
                training.release()
            if not worker.first:
                return None

            # 8. Evaluate.
            scores = _score(training.result, val, options)
            log.evaluation(training.step, options.training.epochs, _for_log(scores))

        # 9. Save and draw.
        save_model(folder, training.result, spec)
        summary = {"arm": options.method.arm, "seed": options.seed, "scores": scores.as_dict()}
        summary |= {"budget": training.budget(), "options": options.as_flat(), "environment": environment()}
        write_json(folder / "summary.json", summary)
        shown = teacher is not None and labels == spec.label_to_category  # else its labels mean other classes
        draw_report(
            folder,
            _detector(training.result, options),
            CocoDataset(val),
            spec.label_to_name,
            Detector(adapt(teacher), ranking="class_quality") if teacher is not None and shown else None,
            assigner=None if one_to_many else METRICS[options.method.metric],
        )
        return scores


def _load_data(options: Options, worker: Worker) -> tuple[CocoIndex, CocoIndex]:
    """Read both splits in the classes of the first, and judge them before any time is spent on them."""
    # 1. Read them.
    data, root = options.dataset, Path(options.dataset.data_path)
    if data.data == "demo" and worker.first:
        write_scenes(root)
    worker.wait()
    train = read_coco(*locate_split(root, "train", data.train_annotations, data.train_images))
    val = read_coco(*locate_split(root, "val", data.val_annotations, data.val_images), train.categories)

    # 2. Judge them. Validation pictures are decoded, too: a broken one would be found after the last epoch.
    model = options.model
    warnings = judge_splits(train, val, size=model.size, short_side=model.short_side, top_k=model.top_k)
    if worker.first:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        judge_pictures(train)
        judge_pictures(val, decode=True)
    worker.wait()
    return train, val


def _load_teacher(
    options: Options, student: nn.Module, val: CocoIndex, worker: Worker
) -> tuple[nn.Module | None, dict[int, Identifier]]:
    """Load the teacher, if one is named and used, and the COCO category of each of its labels."""
    used = needs_teacher(options.method.arm) or options.teachers.inherit
    if not (options.teachers.teacher and used):
        return None, {}
    teacher, labels = load_teacher(options.teachers.teacher, options.model, val.categories)
    teacher.to(worker.device)
    if worker.first and not options.resume:
        _preflight(teacher, student, val, labels, options)
    return teacher, labels


def _preflight(
    teacher: nn.Module, student: nn.Module, val: CocoIndex, labels: dict[int, Identifier], options: Options
) -> None:
    """Refuse a teacher that detects nothing: wrong weights, labels or normalisation would waste the whole run."""
    own = adapt(student)
    detector = TeacherInTraining(adapt(teacher), "class_quality", options.model.top_k, student=own)
    with evaluation_mode(own):  # whose preprocessing draws random numbers in training
        scores = evaluate(
            detector,
            val,
            label_to_category=labels,
            limit=PREFLIGHT_IMAGES,
            batch_size=options.training.batch_size,
        )
    print(f"teacher on {scores.images} validation images: AP {100 * scores.nms.ap:.1f} with NMS", file=sys.stderr)
    if not scores.nms.ap >= options.teachers.teacher_floor:
        raise RunError(
            expected=f"a teacher with an AP of at least {options.teachers.teacher_floor}",
            got=f"{scores.nms.ap:.4f} on {scores.images} validation images",
            where=options.teachers.teacher,
            fix="check that it was trained to the end, on these classes and at this size; or lower --teacher-floor",
        )


def _detector(network: nn.Module, options: Options) -> Detector:
    one_to_many = options.method.arm == "one-to-many"
    return Detector(adapt(network), "class_quality" if one_to_many else "class", options.model.top_k)


def _score(network: nn.Module, index: CocoIndex, options: Options) -> Evaluation:
    detector = _detector(network, options)
    return evaluate(detector, index, batch_size=options.training.batch_size, workers=options.dataset.workers)


def _for_log(scores: Evaluation) -> dict[str, float]:
    values = scores.as_dict()
    return {name: values[name] for name in ("ap", "ap_nms", "ap50", "ap50_nms", "duplicates", "duplicates_nms")}


def _draw_first_batch(folder: Path, dataset: CocoDataset) -> None:
    """Draw what augmentation really does, before any time is spent on it."""
    samples = [dataset[(0, i)] for i in range(min(4, len(dataset)))]
    names = {label: c.name for label, c in enumerate(dataset.index.categories, start=1)}
    boxes = [Target(boxes=target["boxes"], labels=target["labels"]) for _, target in samples]
    draw_predictions(folder / "batch0.png", [image for image, _ in samples], [("training image", boxes)], names)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        scores = run(options)
    except CrossKDError as error:  # what the user can mend, in one sentence
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
