"""Write the tables and plots of docs/results.md and docs/results/ from the recorded runs.

python experiments/tables.py

A table replaces what stands between ``<!-- table: SET SPLIT -->`` and ``<!-- end -->`` in a document; likewise
``gains: SETS SPLIT``, which may end in ``over VARIANT``, ``conversions: SETS SPLIT`` and ``memory: SETS SPLIT``. APs
are per cent, mean ± standard deviation over seeds. Rows whose lines have a ``note`` are marked, and a footnote repeats
it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from plan import SETS, Variant, given_up, variant

mpl.use("agg")

import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
BASELINE = "one-to-many"
BY_CLASS = " by class"
NAMES = {"bccd": "cells", "demo": "scenes", "highway": "roads", "pcb": "boards", "hit_uav": "thermal, from the air"}
MARKS = "†‡§"  # of notes, in order of appearance
Line = dict[str, Any]
Groups = dict[str, list[Line]]  # the seeds of every variant

_TABLE = re.compile(r"(<!-- (\w+): (\S+) (\S+)(?: over (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = [DOCS / "results.md", *sorted((DOCS / "results").glob("*.md"))]


def main(arguments: Sequence[str] | None = None) -> None:
    # 1. Read the lines.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "runs.jsonl", help="JSON lines of the runs")
    parser.add_argument("--documents", type=Path, nargs="+", default=PAGES, help="documents to fill in")
    parser.add_argument("--images", type=Path, default=DOCS / "images", help="folder for the plots")
    options = parser.parse_args(arguments)
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]

    # 2. Fill in the tables.
    makers = {"table": table, "gains": gains, "conversions": conversions, "memory": memorised}
    fill_in(options.documents, {kind: partial(maker, lines) for kind, maker in makers.items()})
    # 3. Draw the plots.
    for data in SETS:
        found = grouped(lines, data, "final")
        if BASELINE in found and not data.startswith("overlap"):  # which `overlap.py` draws
            draw(found, options.images / f"results-{'unlabelled-' * (SETS[data].labelled < 1)}{data}.png", data)
    draw_conversions(lines, options.images / "convert-curve.png")


def fill_in(documents: Iterable[Path], makers: Mapping[str, Callable[..., str]]) -> None:
    """Put tables between the marks of documents; marks of other kinds than the makers' stay as they are."""

    def filled(match: re.Match[str]) -> str:
        begin, kind, data, split, over, end = match.groups()
        if kind not in makers:
            return match[0]
        made = makers[kind](data.split(","), split, **({"over": over} if over else {}))
        return f"{begin}\n{made}\n\n{end}"

    for document in documents:
        document.write_text(_TABLE.sub(filled, document.read_text(encoding="utf-8")), encoding="utf-8")


def grouped(lines: Iterable[Line], data: str, split: str) -> Groups:
    """Group the lines of a set and split by variant, in the order of the plan; variants given up are left out."""
    found: Groups = defaultdict(list)
    for line in lines:
        if (line["data"], line["split"]) == (data, split) and not given_up(line["variant"]):
            found[line["variant"]].append(line)
            if line.get("scores_by_class_alone"):
                found[line["variant"] + BY_CLASS].append({**line, "scores": line["scores_by_class_alone"]})
    return {name: found[name] for name in sorted(found, key=lambda name: (_variant(name).order, name))}


def _variant(name: str) -> Variant:
    return variant(name.removesuffix(BY_CLASS))


def title(name: str, runs: Iterable[Line], marks: Mapping[str, str]) -> str:
    """Write the title of a variant, followed by the marks of its runs' notes."""
    notes = dict.fromkeys(run["note"] for run in runs if "note" in run)
    ranked = ", ranked by class alone" if name.endswith(BY_CLASS) else ""
    return _variant(name).title + ranked + "".join(f" {marks[note]}" for note in notes)


def marks_of(lines: Iterable[Line]) -> dict[str, str]:
    """Give a mark to every note."""
    return dict(zip(dict.fromkeys(line["note"] for line in lines if "note" in line), MARKS, strict=False))


def footnotes(text: str, marks: Mapping[str, str]) -> str:
    """List the notes whose marks stand in a text."""
    return "".join(f"\n\n{mark} {note[0].upper()}{note[1:]}." for note, mark in marks.items() if mark in text)


def with_nms(found: Groups, name: str = BASELINE) -> list[Line]:
    """Choose the runs of a variant ranked as they do better with NMS, by class · centerness or by class alone."""
    rankings = [found[one] for one in (name, name + BY_CLASS) if one in found]
    return max(rankings, key=lambda runs: statistics.mean(run["scores"]["ap_nms"] for run in runs), default=[])


def table(lines: Sequence[Line], data: Sequence[str], split: str) -> str:
    """List all variants of one set, in the order of the plan."""
    marks, rows = marks_of(lines), []
    for name, runs in grouped(lines, data[0], split).items():
        own = _variant(name)
        trained = (variant(one) for one in (own.name, own.teacher, own.origin) if one)
        epochs = " + ".join(str(one.epochs(SETS[data[0]])) for one in trained)
        rows.append(
            [
                title(name, runs, marks),
                epochs,
                spread(runs, "ap"),
                spread(runs, "ap_nms"),
                *(spread(runs, key) for key in ("ap50", "ap_small", "ap_medium", "ap_large")),
                f"{statistics.mean(run['scores']['duplicates'] for run in runs):.2f}",
                _cost(runs),
                f"{statistics.median(run['memory_mb'] for run in runs) / 1024:.1f}",
                f"{len(runs)}",
            ]
        )
    head = "variant|epochs (+ teacher's)|AP without NMS|AP with NMS|AP50|APs|APm|APl|duplicates|CPU min|GiB|seeds"
    text = markdown(head.split("|"), rows)
    return text + footnotes(text, marks)


def gains(lines: Sequence[Line], data: Sequence[str], split: str, over: str = BASELINE) -> str:
    """Compare every variant without NMS with a one-to-many variant with NMS: gains of AP seed by seed, best first.

    The other one-to-many variants have a second row, with NMS. The last column is the mean over the sets, and its
    standard deviation over the seeds that all sets have.
    """
    # 1. Collect the baseline and the contenders, by set.
    found = {name: groups for name in data if over in (groups := grouped(lines, name, split))}
    bases = [_by_seed(with_nms(groups, over), "ap_nms") for groups in found.values()]
    marks, contenders = marks_of(lines), []
    names = {name for groups in found.values() for name in groups if not name.endswith(BY_CLASS)}
    for name in sorted(names, key=lambda name: variant(name).order):
        lists = [groups.get(name, []) for groups in found.values()]
        own = title(name, [run for runs in lists for run in runs], marks)
        contenders.append((own, [_by_seed(runs, "ap") for runs in lists]))
        if name.startswith(BASELINE) and name != over:
            ranked = [_by_seed(with_nms(groups, name), "ap_nms") for groups in found.values()]
            contenders.append((f"{own}, with NMS", ranked))
    # 2. Subtract seed by seed where every set has both, and average over the sets.
    rows = []
    for own, aps in contenders:
        by_seed = [
            {seed: ap[seed] - base[seed] for seed in sorted(ap.keys() & base.keys())}
            for ap, base in zip(aps, bases, strict=True)
        ]
        if found and all(by_seed):
            mean = statistics.mean(statistics.mean(one.values()) for one in by_seed)
            shared = set.intersection(*(set(one) for one in by_seed))
            means = [statistics.mean(one[seed] for one in by_seed) for seed in sorted(shared)]
            deviation = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
            cells = [_plus_minus(list(one.values()), sign=True) for one in by_seed]
            rows.append((mean, [own, *cells, f"**{mean:+.1f}**{deviation}"]))
    best_first = [row for _, row in sorted(rows, key=lambda row: -row[0])]
    text = markdown(["variant, without NMS unless it says so", *found, "mean"], best_first)
    return text + footnotes(text, marks)


def conversions(lines: Sequence[Line], data: Sequence[str], split: str) -> str:
    """Compare a detector with NMS with what its conversions have without, and with itself trained further.

    The last column is the mean gain over the detector with NMS, seed by seed, and over sets. The detector is ranked as
    it does better.
    """
    # 1. The original.
    found = {name: grouped(lines, name, split) for name in data}
    rows = [["the detector, with NMS", *(spread(with_nms(groups), "ap_nms") for groups in found.values()), ""]]
    rows.append(["the detector, without NMS", *(spread(groups[BASELINE], "ap") for groups in found.values()), ""])
    # 2. What became of it.
    names = dict.fromkeys(name for groups in found.values() for name in groups)
    for name in sorted((n for n in names if _is_conversion(n)), key=_shortest_first):
        further = name.startswith(BASELINE)
        ap = [with_nms(groups, name) if further else groups.get(name, []) for groups in found.values()]
        key = "ap_nms" if further else "ap"
        steps = [
            after[seed] - base[seed]
            for runs, groups in zip(ap, found.values(), strict=True)
            for after, base in [(_by_seed(runs, key), _by_seed(with_nms(groups), "ap_nms"))]
            for seed in after
        ]
        gain = f"{statistics.mean(steps):+.1f}" if steps and all(ap) else "–"
        own = variant(name).title
        own += ", all of the epochs" if variant(name).epochs(SETS[data[0]]) == SETS[data[0]].epochs else ""
        own += ", with NMS" if further else ""
        rows.append([own, *(spread(runs, key) for runs in ap), gain])
    return markdown(["", *(NAMES.get(name, name) for name in data), "mean gain"], rows)


def _is_conversion(name: str) -> bool:
    if not {"class", "rate"}.isdisjoint(name.split("-")):
        return False  # an option of them, which pages of sets list
    return name.startswith(("convert", f"{BASELINE}-further")) and not name.endswith(BY_CLASS)


def _shortest_first(name: str) -> tuple[bool, float, str]:
    own = variant(name)
    return name.startswith(BASELINE), own.length if own.options.get("epochs") != 0 else 0.0, name


def _by_seed(runs: Sequence[Line], key: str) -> dict[int, float]:
    return {run["seed"]: 100 * run["scores"][key] for run in runs}


def memorised(lines: Sequence[Line], data: Sequence[str], split: str) -> str:
    """Compare the AP with NMS of teachers on the images they were trained on with that on new ones."""
    rows = []
    for name in data:
        for teacher in (BASELINE, f"{BASELINE}-2x", f"{BASELINE}-large"):
            runs = [r for r in grouped(lines, name, split).get(teacher, []) if r.get("scores_on_training_images")]
            if runs:
                seen = [100 * run["scores_on_training_images"]["ap_nms"] for run in runs]
                rows.append([name, variant(teacher).title, _plus_minus(seen), spread(runs, "ap_nms")])
    return markdown(["set", "teacher", "AP on its training images", "AP on new images"], rows)


def spread(runs: Sequence[Line], key: str) -> str:
    """Write the mean ± standard deviation of a score, in per cent."""
    return _plus_minus([100 * run["scores"][key] for run in runs if run["scores"][key] is not None])


def _plus_minus(values: Sequence[float], *, sign: bool = False) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{'+' if sign else ''}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _cost(runs: Sequence[Line]) -> str:
    seconds = [run["cpu_seconds"] for run in runs if run["cpu_seconds"] is not None]
    return f"{statistics.median(seconds) / 60:.1f}" if seconds else "–"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    rows = list(rows)
    if not rows:
        return "Not run yet."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found: Groups, path: Path, data: str) -> None:
    """Plot the AP of every variant without and with NMS, a mark a seed, beside the baselines with NMS."""
    names, marks = list(found), marks_of(run for runs in found.values() for run in runs)
    figure, axes = plt.subplots(figsize=(11, 0.8 + 0.28 * len(names)), layout="constrained")
    # 1. Draw the baselines, then the runs.
    for baseline, style in ((BASELINE, "--"), (f"{BASELINE}-2x", ":")):
        if runs := with_nms(found, baseline):
            base = statistics.mean(100 * run["scores"]["ap_nms"] for run in runs)
            label = f"{variant(baseline).title}, with NMS, mean"
            axes.axvline(base, color="0.6", linestyle=style, linewidth=1, label=label)
    for y, name in enumerate(names):
        for key, marker in (
            ("ap_nms", {"color": "tab:orange", "marker": "|", "s": 120}),  # so tall that a dot cannot hide it
            ("ap", {"color": "tab:blue", "marker": "o", "s": 28}),
        ):
            values = [100 * run["scores"][key] for run in found[name]]
            key_label = ("with NMS" if key == "ap_nms" else "without NMS") if y == 0 else None
            axes.scatter(values, [y] * len(values), label=key_label, **marker)  # type: ignore[arg-type]
    # 2. Label them.
    labels = [title(name, found[name], marks) for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"AP on {data}, a mark a seed" + footnotes("".join(labels), marks).replace("\n\n", "\n"))
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_conversions(lines: Sequence[Line], path: Path) -> None:
    """Plot the AP of conversions against the share of epochs, a panel a set; that of the detector itself as lines."""
    sets = [data for data in SETS if "convert-10pc" in grouped(lines, data, "final") and not data.startswith("overlap")]
    if not sets:
        return
    columns = 2 if len(sets) <= 4 else 3
    rows = math.ceil(len(sets) / columns)
    size = (4 * columns, 0.7 + 2.9 * rows)
    figure, all_axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    shown: dict[str, Any] = {}
    for axes, data in zip(all_axes.flat, sets, strict=False):
        found = grouped(lines, data, "final")
        # 1. The detector as it was.
        for runs, key, style, label in (
            (with_nms(found), "ap_nms", "--", "the detector, with NMS"),
            (found[BASELINE], "ap", ":", "the detector, without NMS"),
        ):
            axes.axhline(
                100 * statistics.mean(r["scores"][key] for r in runs), color="0.4", linestyle=style, label=label
            )
        # 2. What became of it. Colours of Okabe and Ito, which colour-blind readers tell apart.
        for start, color, marker, label in (
            ("convert", "#0072B2", "o", "converted, without NMS"),
            ("convert-frozen", "#D55E00", "s", "only the branch trained, without NMS"),
            (f"{BASELINE}-further", "#999999", "^", "trained further, with NMS"),
        ):
            key = "ap_nms" if start.startswith(BASELINE) else "ap"
            points = []
            for name in found:
                share = _share_of(name, start)
                if share is not None:
                    values = [
                        100 * r["scores"][key] for r in (with_nms(found, name) if key == "ap_nms" else found[name])
                    ]
                    points.append(
                        (share, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
                    )
            if points:
                x, y, deviation = zip(*sorted(points), strict=True)
                axes.errorbar(x, y, deviation, color=color, marker=marker, capsize=2, label=label)
        axes.set_xscale("symlog", linthresh=5, linscale=0.6)
        axes.set_xticks([0, 5, 10, 25, 50, 100], ["0", "5", "10", "25", "50", "100"])
        axes.set_xlim(-0.7, 115)
        axes.set_xlabel("per cent of the detector's epochs")
        axes.set_title(NAMES.get(data, data))
        axes.grid(alpha=0.3)
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in all_axes[:, 0]:
        axes.set_ylabel("AP")
    for axes in all_axes.flat[len(sets) :]:
        axes.set_axis_off()
    figure.legend(shown.values(), shown, loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _share_of(name: str, start: str) -> float | None:
    """The share of the epochs, in per cent, of a variant that is named by its start and a length alone."""
    rest = name.removeprefix(start)
    if name == "convert-untrained" and start in ("convert", "convert-frozen"):
        return 0.0
    match = re.fullmatch(r"(?:-(\d+)pc)?", rest) if name.startswith(start) else None
    return None if match is None else float(match[1] or 100)


if __name__ == "__main__":
    main()
