"""Makes the tables and plots of docs/results.md from the recorded runs.

python examples/benchmarks/evidence_tables.py

Tables replace what stands between ``<!-- table: SET SPLIT -->`` and ``<!-- end -->``, and likewise for
``gains: SETS SPLIT``, which may end in ``over VARIANT``, and ``memory: SETS SPLIT``; all that the document names so
are filled in. APs are per cent, mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from evidence_plan import SETS, VARIANTS

mpl.use("agg")

import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
BASELINE = "one-to-many"
BY_CLASS = " by class"
Line = dict[str, Any]
Groups = dict[str, list[Line]]  # the seeds of every variant

_TABLE = re.compile(r"(<!-- (table|gains|memory): (\S+) (\S+)(?: over (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "runs.jsonl", help="JSON lines of the runs")
    parser.add_argument("--document", type=Path, default=DOCS / "results.md", help="document to fill in")
    parser.add_argument("--images", type=Path, default=DOCS / "images", help="folder for the plots")
    options = parser.parse_args(arguments)
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]

    def filled(match: re.Match[str]) -> str:
        begin, kind, data, split, over, end = match.groups()
        makers: dict[str, Callable[..., str]] = {"table": table, "gains": gains, "memory": memorised}
        made = makers[kind](lines, data.split(","), split, **({"over": over} if over else {}))
        return f"{begin}\n{made}\n\n{end}"

    text = options.document.read_text(encoding="utf-8")
    options.document.write_text(_TABLE.sub(filled, text), encoding="utf-8")
    for data in SETS:
        found = grouped(lines, data, "final")
        if BASELINE in found:
            draw(found, options.images / f"results-{data}.png", data)


def grouped(lines: Iterable[Line], data: str, split: str) -> Groups:
    """The lines of a set and split by variant, in the order of the plan."""
    found: Groups = defaultdict(list)
    for line in lines:
        if (line["data"], line["split"]) == (data, split):
            found[line["variant"]].append(line)
            if line.get("scores_by_class_alone"):
                found[line["variant"] + BY_CLASS].append({**line, "scores": line["scores_by_class_alone"]})
    return {name: found[name] for variant in VARIANTS for name in (variant, variant + BY_CLASS) if name in found}


def title(name: str) -> str:
    """Of a variant in tables."""
    return VARIANTS[name.removesuffix(BY_CLASS)].title + (", ranked by class alone" if name.endswith(BY_CLASS) else "")


def with_nms(found: Groups, variant: str = BASELINE) -> list[Line]:
    """One-to-many runs, ranked as they do better with NMS, by class · centerness or by class alone."""
    rankings = [found[name] for name in (variant, variant + BY_CLASS) if name in found]
    return max(rankings, key=lambda runs: statistics.mean(run["scores"]["ap_nms"] for run in runs), default=[])


def table(lines: Sequence[Line], data: Sequence[str], split: str) -> str:
    """All variants of one set."""
    rows = []
    for name, runs in grouped(lines, data[0], split).items():
        variant = VARIANTS[name.removesuffix(BY_CLASS)]
        epochs = " + ".join(
            str(round(SETS[data[0]].epochs * VARIANTS[one].length))
            for one in (name.removesuffix(BY_CLASS), variant.teacher, variant.origin)
            if one
        )
        rows.append(
            [
                title(name),
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
    return markdown(head.split("|"), rows)


def gains(lines: Sequence[Line], data: Sequence[str], split: str, over: str = BASELINE) -> str:
    """AP of every variant without NMS over that of a one-to-many variant with NMS, seed by seed, the best first.

    The other one-to-many variants have a second row, with NMS. The last column is the mean over the sets, and its
    standard deviation over the seeds that all sets have.
    """
    found = {name: groups for name in data if over in (groups := grouped(lines, name, split))}
    bases = [_by_seed(with_nms(groups, over), "ap_nms") for groups in found.values()]
    contenders = []
    for variant in VARIANTS:
        contenders.append((VARIANTS[variant].title, [_by_seed(g.get(variant, []), "ap") for g in found.values()]))
        if variant.startswith(BASELINE) and variant != over:
            runs = [_by_seed(with_nms(groups, variant), "ap_nms") for groups in found.values()]
            contenders.append((f"{VARIANTS[variant].title}, with NMS", runs))
    rows = []
    for name, runs in contenders:
        by_seed = [
            {seed: run[seed] - base[seed] for seed in sorted(run.keys() & base.keys())}
            for run, base in zip(runs, bases, strict=True)
        ]
        if found and all(by_seed):
            mean = statistics.mean(statistics.mean(one.values()) for one in by_seed)
            shared = set.intersection(*(set(one) for one in by_seed))
            means = [statistics.mean(one[seed] for one in by_seed) for seed in sorted(shared)]
            deviation = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
            cells = [_plus_minus(list(one.values()), sign=True) for one in by_seed]
            rows.append((mean, [name, *cells, f"**{mean:+.1f}**{deviation}"]))
    ranked = [row for _, row in sorted(rows, key=lambda row: -row[0])]
    return markdown(["variant, without NMS unless it says so", *found, "mean"], ranked)


def _by_seed(runs: Sequence[Line], key: str) -> dict[int, float]:
    return {run["seed"]: 100 * run["scores"][key] for run in runs}


def memorised(lines: Sequence[Line], data: Sequence[str], split: str) -> str:
    """AP with NMS of the teachers on the images they were trained on, and on new ones."""
    rows = []
    for name in data:
        for variant in (BASELINE, f"{BASELINE}-2x", f"{BASELINE}-large"):
            runs = [r for r in grouped(lines, name, split).get(variant, []) if r.get("scores_on_training_images")]
            if runs:
                seen = [100 * run["scores_on_training_images"]["ap_nms"] for run in runs]
                rows.append([name, VARIANTS[variant].title, _plus_minus(seen), spread(runs, "ap_nms")])
    return markdown(["set", "teacher", "AP on its training images", "AP on new images"], rows)


def spread(runs: Sequence[Line], key: str) -> str:
    """Mean ± standard deviation of a score, in per cent."""
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
    """A Markdown table."""
    rows = list(rows)
    if not rows:
        return "Not run yet."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found: Groups, path: Path, data: str) -> None:
    """AP of every variant without and with NMS, a dot a seed, beside the baselines with NMS."""
    names = list(found)
    figure, axes = plt.subplots(figsize=(11, 0.8 + 0.28 * len(names)), layout="constrained")
    for variant, style in ((BASELINE, "--"), (f"{BASELINE}-2x", ":")):
        if runs := with_nms(found, variant):
            base = statistics.mean(100 * run["scores"]["ap_nms"] for run in runs)
            name = f"{VARIANTS[variant].title}, with NMS, mean"
            axes.axvline(base, color="0.6", linestyle=style, linewidth=1, label=name)
    for y, name in enumerate(names):
        for key, marker in (
            ("ap_nms", {"color": "tab:orange", "marker": "|", "s": 120}),  # so tall that a dot cannot hide it
            ("ap", {"color": "tab:blue", "marker": "o", "s": 28}),
        ):
            values = [100 * run["scores"][key] for run in found[name]]
            label = ("with NMS" if key == "ap_nms" else "without NMS") if y == 0 else None
            axes.scatter(values, [y] * len(values), label=label, **marker)  # type: ignore[arg-type]
    axes.set_yticks(range(len(names)), [title(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"AP on {data}, a mark a seed")
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
