"""Train a detector on a COCO folder: one arm, one folder, resumable at every step.

python examples/coco/train.py --arm one-to-many --data demo --output runs/demo/teacher
python examples/coco/train.py --arm cross-head --data demo --teacher runs/demo/teacher --output runs/demo/student
torchrun --nproc-per-node 8 examples/coco/train.py …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from coco_example.command_line import parse_options
from coco_example.commands import run_command, say
from coco_example.data.dataset import CocoDataset
from coco_example.data.reader import CocoIndex
from coco_example.engine.best import Best
from coco_example.engine.compilation import compile_backbones
from coco_example.engine.distributed import Worker, join_workers
from coco_example.engine.identity import describe_data, describe_teacher
from coco_example.engine.inputs import load_data, load_judged_teacher, load_unlabelled
from coco_example.engine.loading import TrainingData
from coco_example.engine.loggers import Loggers
from coco_example.engine.metrics_log import MetricsLog
from coco_example.engine.processor import slow_precision
from coco_example.engine.run_folder import claimed_folder, environment, goes_on, open_folder
from coco_example.engine.signals import Interrupted, Signals, caught_signals
from coco_example.engine.training import Training
from coco_example.engine.validation import ValidationLosses
from coco_example.errors import RunError
from coco_example.evaluation.comparison import comparison_table, time_both
from coco_example.evaluation.evaluation import Detector, Evaluation, Ranking, evaluate, table
from coco_example.evaluation.operating_point import describe_thresholds
from coco_example.figures.draw import draw_predictions
from coco_example.figures.report import draw_report
from coco_example.files import write_json
from coco_example.models.batch_norm import learns_batch_norm, synchronise_batch_norm
from coco_example.models.conversion import (
    in_labels_of,
    load_source,
    trained_labels,
)
from coco_example.models.detectors import build_detector
from coco_example.models.methods import METRICS, build_method, freeze
from coco_example.models.saved_model import ModelSpec, save_model, save_spec
from coco_example.models.score_thresholds import ScoreThresholds
from coco_example.models.teachers import load_teacher
from coco_example.options import Options
from torch import nn

from crosskd_assign import adapt, inherit
from crosskd_assign.structures import Target

__all__ = ["run"]

CHOSEN_ON = "validation images"  # score thresholds

_BATCH_NORM = (
    "batch norm is trained, and each process normalises by its own images: results depend on the number of processes; "
    "--sync-batch-norm makes them those of one"
)


def run(options: Options) -> Evaluation | None:
    """Train, save, evaluate and draw one run.

    Returns:
        The final scores on rank 0, None on others.

    Raises:
        CrossKDError: Something is wrong with options, data, models or folders, or training diverged.
        OSError: A file cannot be read or written.
        Interrupted: A signal stopped it; what is trained is saved.
    """
    folder = Path(options.output)
    with caught_signals() as signals, join_workers(device=options.device) as worker:
        signals.place = "before the first step"
        try:
            with claimed_folder(folder, options, worker) as begun:
                return _run(options, folder, worker, signals, begun=begun)
        except Interrupted as stop:
            go_on = f"go on with: train.py … --output {folder} --resume" if goes_on(folder) else "start it again"
            raise Interrupted(stop.number, f"{stop}; {go_on}") from None


def _run(options: Options, folder: Path, worker: Worker, signals: Signals, *, begun: bool) -> Evaluation | None:
    # 1. Who gets the log; images, and the detector that is converted if it is no run's: it has a size and labels.
    loggers = Loggers(options.log_to if worker.first else ())
    asked, source = options, load_source(options)
    if source is not None:
        options = replace(options, model=source.at_own_size(options.model))
    train, val = load_data(options, worker)
    spec = _spec(options, train) if source is None else source.spec(options.model, train)
    train = in_labels_of(train, spec)
    unlabelled = load_unlabelled(options, train, val, worker)

    # 2. The detector. Its weights are drawn from the seed alone; what is drawn later depends on the rank, too.
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(options.deterministic)
    if source is not None:
        model = source.student(options.model)
    else:
        model = build_detector(options.model, train.num_classes, resize_to_train=not options.dataset.multi_scale)
    if options.training.sync_batch_norm:
        synchronise_batch_norm(model, worker.device)

    # 3. What it learns from, what it starts with, and how it is trained.
    teacher, labels = load_judged_teacher(options, model, val, worker, source, check=not begun)
    if source is None:
        _inherit(options, model, teacher, worker)
    classes = trained_labels(train, spec)
    method = build_method(options.method, model.to(worker.device), teacher, classes).to(worker.device)
    frozen = freeze(model, options.method.freeze)
    if options.training.channels_last:
        method.to(memory_format=torch.channels_last)
    if options.compile:
        compile_backbones(model, teacher)

    # 4. The folder: only now, because a refused teacher must not leave one that looks in use.
    def start() -> str | None:
        inputs = {"train": describe_data(train), "val": describe_data(val), "unlabelled": describe_data(unlabelled)}
        inputs |= {"teacher": describe_teacher(teacher, labels)}
        return open_folder(folder, asked, inputs, worker.count, begun=begun)

    identity = worker.first_does(start)

    # 5. Train.
    torch.manual_seed(options.seed + 1 + worker.rank)
    validation = ValidationLosses(options, in_labels_of(val, spec), worker) if options.training.val_losses else None
    training = Training(options, folder, method, model, train, worker, identity, frozen, validation, unlabelled)
    if begun:
        training.resume()
    best = Best(folder, spec, options)

    def score(network: nn.Module) -> dict[str, float]:
        scores = _score(network, val, options, worker, spec)
        if worker.first:
            best.offer(network, _for_log(scores), training.step, _thresholds(scores, spec))
        return _for_log(scores)

    with loggers.opened(folder, training.step) as hook, _open_log(folder, training, options, hook) as log:
        _introduce(log, training, folder, train, spec)
        try:
            training.fit(log, score, signals)
        finally:
            training.release()

        # 6. Save, evaluate and draw.
        shown = labels == spec.label_to_category  # else the teacher's labels mean other classes
        return _finish(folder, training, log, val, spec, teacher if shown else None, best)


def _spec(options: Options, train: CocoIndex) -> ModelSpec:
    categories = tuple((category.id, category.name) for category in train.categories)
    return ModelSpec(options.model, options.method.arm == "one-to-many", categories)


def _inherit(options: Options, model: nn.Module, teacher: nn.Module | None, worker: Worker) -> None:
    # 1. From what, and which parts.
    given = options.teachers
    origin = teacher if given.inherit or given.convert else None
    parts = ("backbone", "neck", "head") if given.convert or given.inherit_head else ("backbone", "neck")
    if given.inherit_from:
        origin, _ = load_teacher(given.inherit_from, options.model, option="--inherit-from")
    if origin is None:
        return

    # 2. A detector that is converted starts as it is.
    report = inherit(model, origin, parts)
    if given.convert and report.skipped:
        raise RunError(
            expected="the options of the detector that is converted",
            got=f"others: {report}",
            where=f"--convert {given.convert}",
            fix="leave out --architecture, --backbone, --channels and --head-convs",
        )
    if worker.first:
        say(f"{report}")


def _open_log(folder: Path, training: Training, options: Options, hook: Callable[[dict[str, Any]], None]) -> MetricsLog:
    loop = options.training
    return MetricsLog(
        folder,
        total_steps=training.total_steps,
        start_step=training.step,
        batch_size=loop.batch_size * loop.accumulate * training.worker.count,
        enabled=training.worker.first,
        interval=loop.log_every,
        hook=hook,
    )


def _introduce(log: MetricsLog, training: Training, folder: Path, train: CocoIndex, spec: ModelSpec) -> None:
    """Report what the run is trained on, and what would slow it down."""
    if training.worker.first:
        if training.step == 0:
            log.message(f"data: {train.report}")
            if training.data.unlabelled is not None:
                share = f"{training.data.unlabelled_per_batch} of {training.options.training.batch_size} in a batch"
                log.message(f"without labels: {len(training.data.unlabelled):,} images, {share}")
            _draw_first_batch(folder, training.data, spec.label_to_name)
        slow = slow_precision(training.options.training.precision, training.worker.device)
        if slow is not None:
            log.message(slow)
        if training.worker.count > 1 and learns_batch_norm(training.model, training.frozen):
            log.message(_BATCH_NORM)
    training.worker.wait()


def _finish(
    folder: Path,
    training: Training,
    log: MetricsLog,
    val: CocoIndex,
    spec: ModelSpec,
    teacher: nn.Module | None,
    best: Best,
) -> Evaluation | None:
    # 1. Save before anything else, and evaluate on all processes.
    options, worker, network = training.options, training.worker, training.result
    if worker.first:
        save_model(folder, network, spec)
    worker.share(network)
    training.validate(log)
    scores = _score(network, val, options, worker, spec)
    asked = replace(options, method=replace(options.method, arm="one-to-many"))
    converted = teacher if options.teachers.convert else None
    before = None if converted is None else _score(converted, val, asked, worker, spec)
    if not worker.first:
        return None

    # 2. The thresholds to use it with.
    thresholds = _thresholds(scores, spec)
    save_spec(folder, replace(spec, thresholds=thresholds))
    best.offer(network, _for_log(scores), training.step, thresholds)

    # 3. Report.
    log.evaluation(training.step, options.training.epochs, _for_log(scores))
    summary: dict[str, Any] = {"arm": options.method.arm, "seed": options.seed, "scores": scores.as_dict()}
    if before is not None and converted is not None:
        times = time_both(_detector(converted, asked), _detector(network, options), CocoDataset(val))
        summary |= {"before": before.as_dict(), "milliseconds_per_image": asdict(times)}
        say(comparison_table(before, scores, times))
    if training.data.unlabelled is not None:
        summary["unlabelled"] = {"images": len(training.data.unlabelled)}
    if best.enabled and (found := best.found()):
        summary["best"] = found
        ap = 100 * found[best.score]
        say(f"best: step {found['step']} of {training.step}, {best.score} {ap:.1f}, in {best.folder}")
    summary["thresholds"] = describe_thresholds(
        scores.usable(with_nms=spec.one_to_many),
        spec.label_to_name,
        chosen_on=CHOSEN_ON,
        with_nms=spec.one_to_many,
    )
    summary |= {"budget": training.budget(), "options": options.as_flat(), "environment": environment(options.device)}
    write_json(folder / "summary.json", summary)
    draw_report(
        folder,
        _detector(network, options),
        CocoDataset(in_labels_of(val, spec)),
        spec.label_to_name,
        None if teacher is None else Detector(adapt(teacher), ranking="class_quality"),
        assigner=None if spec.one_to_many else METRICS[options.method.metric],
    )
    return scores


def _detector(network: nn.Module, options: Options) -> Detector:
    one_to_many = options.method.arm == "one-to-many"
    ranking: Ranking = "class_quality" if one_to_many else "class"
    return Detector(adapt(network), ranking, options.model.top_k, options.model.one_class_per_point)


def _score(network: nn.Module, index: CocoIndex, options: Options, worker: Worker, spec: ModelSpec) -> Evaluation:
    return evaluate(
        _detector(network, options),
        index,
        label_to_category=spec.label_to_category if spec.detector else None,
        batch_size=options.training.batch_size,
        workers=options.dataset.workers,
        precision=getattr(torch, options.training.eval_precision),
        worker=worker,
    )


def _thresholds(scores: Evaluation, spec: ModelSpec) -> ScoreThresholds | None:
    return ScoreThresholds.of_best_f1(scores.usable(with_nms=spec.one_to_many), CHOSEN_ON)


def _for_log(scores: Evaluation) -> dict[str, float]:
    values = scores.as_dict()
    return {name: values[name] for name in ("ap", "ap_nms", "ap50", "ap50_nms", "duplicates", "duplicates_nms")}


def _draw_first_batch(folder: Path, data: TrainingData, names: dict[int, str]) -> None:
    """Draw what augmentation really does, before any time is spent on it; images without labels have no boxes."""
    samples = [data.dataset[(0, i)] for i in range(min(4, len(data.dataset)))]
    if data.unlabelled is not None:
        samples += [data.unlabelled[(0, i)] for i in range(min(2, len(data.unlabelled)))]
    boxes = [Target(boxes=target["boxes"], labels=target["labels"]) for _, target in samples]
    draw_predictions(folder / "batch0.png", [image for image, _ in samples], [("training image", boxes)], names)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    return run_command(lambda: _show(run(options)))


def _show(scores: Evaluation | None) -> None:
    if scores is not None:
        rows = [("without NMS", scores.plain, scores.duplicates), ("with NMS", scores.nms, scores.duplicates_nms)]
        say(table(rows))


if __name__ == "__main__":
    raise SystemExit(main())
