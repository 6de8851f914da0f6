"""What a run starts from, judged before any time is spent on it: images, pictures without labels, a teacher."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from coco_example.commands import say, warn
from coco_example.data.layouts import locate_split
from coco_example.data.preflight import judge_pictures, judge_splits, judge_unlabelled
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.data.scenes import write_scenes
from coco_example.data.unlabelled import read_unlabelled
from coco_example.data.values import Identifier
from coco_example.engine.distributed import Worker
from coco_example.errors import DataError, RunError
from coco_example.evaluation.evaluation import evaluate
from coco_example.models.conversion import Source, classes_of_run, refuse_unknown
from coco_example.models.methods import needs_teacher
from coco_example.models.teachers import TeacherInTraining, load_teacher
from coco_example.options import Options
from crosskd_assign import adapt
from crosskd_assign.detectors.probing import evaluation_mode

__all__ = ["PREFLIGHT_IMAGES", "load_data", "load_judged_teacher", "load_unlabelled"]

PREFLIGHT_IMAGES = 64


def load_data(options: Options, worker: Worker) -> tuple[CocoIndex, CocoIndex]:
    """Read both splits in the classes of the first, and judge them before any time is spent on them."""
    # 1. Read them.
    data, root = options.dataset, Path(options.dataset.data_path)
    if data.data == "demo" and worker.first:
        write_scenes(root)
    worker.wait()
    classes = classes_of_run(options.teachers.convert)
    train_files = locate_split(root, "train", data.train_annotations, data.train_images)
    train = read_coco(*train_files, classes, progress=worker.first)
    refuse_unknown(train.annotations.unknown, train)
    val_files = locate_split(root, "val", data.val_annotations, data.val_images)
    val = read_coco(*val_files, train.categories, progress=worker.first)

    # 2. Judge them. Validation pictures are decoded, too: a broken one would be found after the last epoch.
    model = options.model
    warnings = judge_splits(train, val, size=model.size, short_side=model.short_side, top_k=model.top_k)
    if worker.first:
        warn(warnings, DataError.page)
        judge_pictures(train)
        judge_pictures(val, decode=True)
    worker.wait()
    return train, val


def load_unlabelled(options: Options, train: CocoIndex, val: CocoIndex, worker: Worker) -> CocoIndex | None:
    """Find the pictures without labels, if a folder of them is named."""
    if not options.dataset.unlabelled:
        return None
    unlabelled, warnings = read_unlabelled(Path(options.dataset.unlabelled))
    if worker.first:
        warn((*warnings, *judge_unlabelled(unlabelled, train, val)), DataError.page)
    worker.wait()
    return unlabelled


def load_judged_teacher(
    options: Options, student: nn.Module, val: CocoIndex, worker: Worker, source: Source | None, *, check: bool
) -> tuple[nn.Module | None, dict[int, Identifier]]:
    """Load the teacher, if one is named and used, and the COCO category of each of its labels."""
    given = options.teachers
    used = needs_teacher(options.method.arm) or given.inherit or given.convert
    reference = given.convert or given.teacher
    if not (reference and used):
        return None, {}
    if source is None:
        option = "--convert" if given.convert else "--teacher"
        teacher, labels = load_teacher(reference, options.model, val.categories, option=option)
    else:
        teacher, labels = source.model, source.labels
    teacher.to(worker.device)
    if check:
        _preflight(teacher, student, val, labels, options, worker)
    return teacher, labels


def _preflight(
    teacher: nn.Module,
    student: nn.Module,
    val: CocoIndex,
    labels: dict[int, Identifier],
    options: Options,
    worker: Worker,
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
            worker=worker,
        )
    if worker.first:
        say(f"teacher on {scores.images} validation images: AP {100 * scores.nms.ap:.1f} with NMS")
    if not scores.nms.ap >= options.teachers.teacher_floor:
        raise RunError(
            expected=f"a teacher with an AP of at least {options.teachers.teacher_floor}",
            got=f"{scores.nms.ap:.4f} on {scores.images} validation images",
            where=options.teachers.convert or options.teachers.teacher,
            fix="check that it was trained to the end, on these classes and at this size; or lower --teacher-floor",
        )
