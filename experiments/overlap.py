"""Score finished runs on crowds of one overlap each, and draw AP and recall against the overlap.

python experiments/run.py --data-root ../shared/data --sets overlap_scenes overlap_cells --study overlap
python experiments/overlap.py --data-root ../shared/data

One-to-many runs are scored with NMS at three thresholds and with Soft-NMS, ranked by class · centerness and by class
alone; the others as they are. Each line of ``experiments/overlap.jsonl`` is one run, ranked and selected in one way;
those that are there are not made again. Objects are found by detections with a score above that of the best F1 on
images that mix all overlaps, one object by one detection; the others are lost. Tables replace what stands between
``<!-- curves: SET SCORE -->`` and ``<!-- end -->`` in a document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from plan import SETS, STUDIES, Run, planned, variant
from run import ROOT  # whose import finds coco_example

# isort: split
from coco_example.data.layouts import locate_split
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.evaluation.coco_metrics import coco_evaluate, coco_results
from coco_example.evaluation.evaluation import Detector, Ranking
from coco_example.models.saved_model import load_model
from found import detected, match, soft_nms, targets_of
from made import OVERLAPS, make, make_crowds
from tables import PAGES, fill_in, markdown

from crosskd_assign import adapt
from crosskd_assign.postprocessing import suppress
from crosskd_assign.structures import Detection

mpl.use("agg")

import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

plt.style.use("tableau-colorblind10")

Line = dict[str, Any]
Selection = Callable[[Detection], Detection]

LINES = ROOT / "experiments" / "overlap.jsonl"
IMAGES = ROOT / "docs" / "images"
TOP_K = 100
NMS_THRESHOLDS = (0.5, 0.6, 0.7)
SCORES = {"ap": "AP", "recall100": "recall of 100 detections", "recall": "recall above the threshold"}
PERFECT = "perfect detections"
BASELINE, NO_NMS = "one-to-many", "no NMS"


def main(arguments: Sequence[str] | None = None) -> None:
    # 1. Read the options, and the lines that are there.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    crowds = [name for name in SETS if name.startswith("overlap")]
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder that run.py kept the runs in")
    parser.add_argument("--lines", type=Path, default=LINES, help="file of JSON lines to read and append to")
    parser.add_argument("--documents", type=Path, nargs="+", default=PAGES, help="documents to fill in")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the plots")
    parser.add_argument("--study", nargs="+", default=list(STUDIES["overlap"]), help="variants to score")
    parser.add_argument("--sets", nargs="+", default=crowds, choices=crowds, help="data sets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds")
    options = parser.parse_args(arguments)
    text = options.lines.read_text(encoding="utf-8") if options.lines.exists() else ""
    lines: list[Line] = [json.loads(line) for line in text.splitlines()]

    # 2. Score the runs that are finished; each line is there as soon as it is known.
    done = {(line["run"], line["data"], line.get("ranking"), line["selection"]) for line in lines}
    for data in options.sets:
        images: dict[str, CocoIndex] = {}
        runs = (run for name in options.study for run in planned(name, [data], "final", options.seeds))
        for run in dict.fromkeys(runs):
            folder = options.work / run.key
            left = [way for way in ways(run) if (run.key, data, *way) not in done]
            if left and (folder / "summary.json").exists():
                images = images or crowds_of(data, options.data_root.resolve(), options.work.resolve())
                ideal = () if (PERFECT, data, None, "NMS 0.5") in done else perfect(data, images)
                done.add((PERFECT, data, None, "NMS 0.5"))
                for line in itertools.chain(ideal, scored(run, folder, images, left)):
                    lines.append(line)
                    with options.lines.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                print(f"scored {run.key}", flush=True)

    # 3. Draw them, and fill in their tables.
    for data in options.sets:
        if any(line["data"] == data for line in lines):
            draw(lines, options.images / f"{data}.png", data)
    fill_in(options.documents, {"curves": lambda data, key: table(best_rankings(lines, data[0]), key)})


def crowds_of(data: str, data_root: Path, work: Path) -> dict[str, CocoIndex]:
    """Read the validation images of each overlap, and as "mixed" those of all."""
    folders = {"mixed": make(data, data_root, work)}
    folders |= {f"{overlap:g}": make_crowds(data, data_root, work, overlap) for overlap in OVERLAPS}
    return {name: read_coco(*locate_split(folder, "val")) for name, folder in folders.items()}


# --- scores


def selections(*, one_to_many: bool) -> dict[str, Selection]:
    """List the ways to select detections, by name."""
    found: dict[str, Selection] = {NO_NMS: lambda detection: _first(detection, TOP_K)}
    for threshold in NMS_THRESHOLDS if one_to_many else (0.6,):
        found[f"NMS {threshold}"] = partial(suppress, iou_threshold=threshold, top_k=TOP_K)
    if one_to_many:
        found["Soft-NMS"] = partial(soft_nms, decay="gaussian", top_k=TOP_K)
        found["linear Soft-NMS"] = partial(soft_nms, decay="linear", top_k=TOP_K)
    return found


def ways(run: Run) -> list[tuple[Ranking, str]]:
    """List the ways to rank and select a run's detections."""
    many = run.options["arm"] == "one-to-many"
    rankings: tuple[Ranking, ...] = ("class_quality", "class") if many else ("class",)
    return list(itertools.product(rankings, selections(one_to_many=many)))


def scored(
    run: Run, folder: Path, images: Mapping[str, CocoIndex], left: Sequence[tuple[Ranking, str]]
) -> Iterator[Line]:
    """Score a finished run on images of each overlap, in those ways to rank and select that are left."""
    model, spec = load_model(folder)
    for ranking in dict.fromkeys(ranking for ranking, _ in left):
        detector = Detector(adapt(model), ranking)
        candidates = {name: detected(detector, index) for name, index in images.items()}
        for name in [name for one, name in left if one == ranking]:
            select = selections(one_to_many=spec.one_to_many)[name]
            found = {overlap: [select(d) for d in detections] for overlap, detections in candidates.items()}
            # The threshold that a user would choose, who does not know how much objects are going to overlap.
            threshold = match(found["mixed"], targets_of(images["mixed"])).threshold()
            yield {
                "run": run.key,
                "data": run.data,
                "variant": run.variant,
                "seed": run.seed,
                "ranking": ranking,
                "selection": name,
                "threshold": round(threshold, 5),
                "scores": {overlap: scores(found[overlap], images[overlap], threshold) for overlap in images},
            }


def scores(detections: Sequence[Detection], index: CocoIndex, threshold: float) -> dict[str, float]:
    """Score detections: AP, recall of all, and what is found, lost and wrong above a threshold."""
    ids = [record.id for record in index.records]
    coco = coco_evaluate(index.annotations, coco_results(detections, ids, index.label_to_category), image_ids=ids)
    matches = match(detections, targets_of(index))
    found, reported = matches.found(threshold), matches.reported(threshold)
    numbers = {
        "ap": coco.ap,
        "ap50": coco.ap50,
        "ap75": coco.ap75,
        "ar100": coco.ar100,
        "recall100": matches.found() / matches.objects,
        "recall": found / matches.objects,
        "precision": found / max(1, reported),
    }
    rounded = {name: round(value, 5) for name, value in numbers.items()}
    return {**rounded, "lost": matches.objects - found, "objects": matches.objects}


def perfect(data: str, images: Mapping[str, CocoIndex]) -> Iterator[Line]:
    """Score perfect detections with NMS: what no detector with NMS can do better."""
    for threshold in NMS_THRESHOLDS:
        kept = {name: {"recall": round(kept_of_perfect(index, threshold), 5)} for name, index in images.items()}
        yield {"run": PERFECT, "data": data, "variant": PERFECT, "selection": f"NMS {threshold}", "scores": kept}


def kept_of_perfect(index: CocoIndex, threshold: float) -> float:
    """Return the share of objects that NMS leaves of perfect detections, whose scores are random."""
    generator, kept = torch.Generator().manual_seed(0), 0
    for target in targets_of(index):
        boxes, labels = target["boxes"], target["labels"]
        found: Detection = {"boxes": boxes, "scores": torch.rand(len(boxes), generator=generator), "labels": labels}
        kept += len(suppress(found, threshold)["boxes"])
    return kept / index.report.boxes


def _first(detection: Detection, count: int) -> Detection:
    return {
        "boxes": detection["boxes"][:count],
        "scores": detection["scores"][:count],
        "labels": detection["labels"][:count],
    }


# --- curves

Curve = tuple[str, str]  # variant and selection
Curves = dict[Curve, list[Line]]  # the seeds of each


def best_rankings(lines: Iterable[Line], data: str) -> Curves:
    """Group a set's lines by variant and selection; of two rankings, the one with the higher AP on the mix counts."""
    found: dict[Curve, dict[str, list[Line]]] = {}
    for line in lines:
        if line["data"] == data and line["run"] != PERFECT:
            rankings = found.setdefault((line["variant"], line["selection"]), {})
            rankings.setdefault(line["ranking"], []).append(line)
    best = {curve: max(by.values(), key=lambda runs: _mean(runs, "mixed", "ap")) for curve, by in found.items()}
    return dict(sorted(best.items(), key=lambda item: (variant(item[0][0]).order, item[0][1])))


def one_to_many(curves: Curves) -> Curves:
    """Keep the one-to-many curves: with any NMS, and without, because duplicates may hit a neighbour by chance."""
    return {curve: runs for curve, runs in curves.items() if curve[0].startswith(BASELINE)}


def students(curves: Curves) -> Curves:
    """Keep the curves of one-to-one students without NMS."""
    return {curve: runs for curve, runs in curves.items() if not curve[0].startswith(BASELINE) and curve[1] == NO_NMS}


def ahead_from(curves: Curves, runs: Sequence[Line], key: str) -> str:
    """Find the overlap from which on runs are above every one-to-many curve, on the mean."""
    rivals, ahead = one_to_many(curves).values(), ""
    for overlap in reversed([f"{x:g}" for x in OVERLAPS]):
        if _mean(runs, overlap, key) <= max((_mean(r, overlap, key) for r in rivals), default=-1.0):
            break
        ahead = overlap
    return ahead or "–"


def table(curves: Curves, key: str) -> str:
    """List a score of every curve by overlap, per cent, mean ± standard deviation of the seeds."""
    overlaps, rows = [f"{overlap:g}" for overlap in OVERLAPS], []
    for (name, selection), runs in {**one_to_many(curves), **students(curves)}.items():
        cells = [_spread(runs, overlap, key) for overlap in overlaps]
        ahead = "" if name.startswith(BASELINE) else ahead_from(curves, runs, key)
        rows.append([f"{variant(name).title}, {selection}", *cells, ahead, f"{len(runs)}"])
    rivals = one_to_many(curves).values()
    for (name, _), runs in students(curves).items() if rivals else ():
        leads = [_mean(runs, o, key) - max(_mean(r, o, key) for r in rivals) for o in overlaps]
        cells = [f"{100 * lead:+.1f}" for lead in leads]
        rows.append([f"{variant(name).title}, over the best one-to-many", *cells, "", ""])
    return markdown([SCORES[key], *overlaps, "ahead from", "seeds"], rows)


def draw(lines: Sequence[Line], path: Path, data: str) -> None:
    """Plot AP and recall against the overlap; bands are standard deviations of the seeds."""
    curves = best_rankings(lines, data)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    # 1. Draw the baseline in every way, dashed; longer ones in the best; the students.
    rivals = one_to_many(curves)
    shown = {curve: runs for curve, runs in rivals.items() if curve[0] == BASELINE}
    for name in dict.fromkeys(name for name, _ in rivals if name != BASELINE):
        own = {curve: runs for curve, runs in rivals.items() if curve[0] == name}
        best = max(own, key=lambda curve: _mean(own[curve], "mixed", "ap"))
        shown[best] = own[best]
    shown |= students(curves)
    for axes, key in zip(panels, ("ap", "recall"), strict=True):
        for n, ((name, selection), runs) in enumerate(shown.items()):
            means = [100 * _mean(runs, f"{overlap:g}", key) for overlap in OVERLAPS]
            spreads = [100 * _deviation(runs, f"{overlap:g}", key) for overlap in OVERLAPS]
            # Apart without colours, too: dashes, widths and marks.
            style = {"ls": "--", "lw": 1.2} if name.startswith(BASELINE) else {"ls": "-", "lw": 2.4}
            label = f"{variant(name).title}, {selection}" if key == "ap" else None
            axes.plot(OVERLAPS, means, color=f"C{n % 10}", marker="osD^vP*X"[n % 8], ms=5, label=label, **style)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(OVERLAPS, low, high, color=f"C{n % 10}", alpha=0.12, linewidth=0)
        axes.set_xlabel(f"IoU of neighbours of one class ({data})")
        axes.set_title(f"{SCORES[key]}, per cent")
        axes.grid(alpha=0.3)
    # 2. Draw what NMS leaves of perfect detections.
    for shade, line in enumerate(line for line in lines if line["run"] == PERFECT and line["data"] == data):
        kept = [100 * line["scores"][f"{overlap:g}"]["recall"] for overlap in OVERLAPS]
        label = f"{PERFECT}, {line['selection']}"
        panels[1].plot(OVERLAPS, kept, ":", color=f"{0.2 + 0.25 * shade:g}", label=label)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _values(runs: Sequence[Line], overlap: str, key: str) -> list[float]:
    return [run["scores"][overlap][key] for run in runs]


def _mean(runs: Sequence[Line], overlap: str, key: str) -> float:
    return statistics.mean(_values(runs, overlap, key))


def _deviation(runs: Sequence[Line], overlap: str, key: str) -> float:
    return statistics.stdev(_values(runs, overlap, key)) if len(runs) > 1 else 0.0


def _spread(runs: Sequence[Line], overlap: str, key: str) -> str:
    deviation = f" ± {100 * _deviation(runs, overlap, key):.1f}" if len(runs) > 1 else ""
    return f"{100 * _mean(runs, overlap, key):.1f}{deviation}"


if __name__ == "__main__":
    main()
