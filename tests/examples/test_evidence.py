"""The evidence: its plan fits the training script, runs are recorded once, tables say what the lines say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evidence
import evidence_plan
import evidence_tables
import pytest
from evidence_plan import SETS, STUDIES, VARIANTS, Protocol, Run, planned
from options import parse_options


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_understood_by_the_training_script(variant, tmp_path):
    bench = evidence.Bench(tmp_path, tmp_path, tmp_path / "runs.jsonl")
    run = Run("bccd", "final", variant, 2)
    arguments = ["--output", "x", "--data-path", str(tmp_path), "--teacher", "t", *bench._flags(run.options)]
    options = parse_options(arguments)
    assert options.seed == 2
    assert options.epochs == round(SETS["bccd"].epochs * VARIANTS[variant].length)
    assert not options.inherit or run.teacher is not None


def test_every_variant_of_a_set_differs_in_nothing_but_what_it_says():
    for name in SETS:
        common = SETS[name].options
        for variant in VARIANTS.values():
            assert not common.keys() & variant.options.keys() - {"head_convs"}


@pytest.mark.parametrize("name", SETS)
def test_the_larger_network_differs_in_what_its_set_says(name):
    small, large = (Run(name, "final", variant, 0).options for variant in ("one-to-many", "one-to-many-large"))
    assert large == small | SETS[name].larger != small
    assert large["channels"] >= small.get("channels", 0)  # a set of wider students needs a wider teacher


def test_recorded_runs_are_those_of_the_plan():
    lines = [json.loads(line) for line in evidence.RESULTS.read_text().splitlines()]
    runs = {line["run"]: Run(line["data"], line["split"], line["variant"], line["seed"]) for line in lines}
    known = [line for line in lines if line["variant"] in VARIANTS]
    assert len(known) > len(lines) - 10  # a few variants were given up with their code
    for line in known:
        assert runs[line["run"]].options == line["options"]


@pytest.mark.parametrize("study", STUDIES)
def test_teachers_are_planned_before_their_students_and_once(study):
    runs = list(planned(study, ["bccd", "pcb"], "tune", [0, 1]))
    assert len(set(runs)) == len(runs)
    for i, run in enumerate(runs):
        assert set(run.needs) <= set(runs[:i])
    assert {run.variant for run in runs} >= set(STUDIES[study])


def test_an_unfinished_teacher_keeps_its_students_waiting_and_a_lost_one_is_trained_again(tmp_path):
    results = tmp_path / "runs.jsonl"
    teacher, student = Run("bccd", "final", "one-to-many", 0), Run("bccd", "final", "cross-head", 0)
    results.write_text(json.dumps({"run": teacher.key, "options": teacher.options}) + "\n")
    assert evidence.Bench(tmp_path, tmp_path, results).left([teacher, student]) == [teacher, student]
    (tmp_path / teacher.key).mkdir(parents=True)
    (tmp_path / teacher.key / "model.json").touch()
    assert evidence.Bench(tmp_path, tmp_path, results).left([teacher, student]) == [student]


def test_a_student_waits_for_what_it_learns_from_and_for_what_it_inherits_from():
    run = Run("bccd", "tune", "cross-head-large-inherit-decay", 1)
    assert [need.variant for need in run.needs] == ["one-to-many-large", "one-to-many"]
    assert {(need.data, need.split, need.seed) for need in run.needs} == {("bccd", "tune", 1)}


def test_a_shared_teacher_is_planned_once_for_all_seeds():
    runs = list(planned("cross-head-large", ["demo"], "final", [1, 2]))
    assert [(run.variant, run.seed) for run in runs] == [
        ("one-to-many-large", 0),
        ("cross-head-large", 1),
        ("cross-head-large", 2),
    ]


def test_a_line_made_with_other_options_is_refused(tmp_path):
    run = Run("bccd", "final", "one-to-many", 0)
    (tmp_path / "runs.jsonl").write_text(json.dumps({"run": run.key, "options": {**run.options, "lr": 7.0}}) + "\n")
    with pytest.raises(SystemExit, match=r"Expected bccd/final/one-to-many/0 with the options .* Fix: "):
        evidence.Bench(tmp_path, tmp_path, tmp_path / "runs.jsonl").left([run])


def test_images_held_out_are_a_quarter_of_the_training_images_and_no_others(scenes_folder, tmp_path):
    evidence._hold_out(scenes_folder, tmp_path / "held-out")
    parts = [
        json.loads((tmp_path / "held-out" / "annotations" / f"instances_{split}.json").read_text())
        for split in ("train", "val")
    ]
    whole = json.loads((scenes_folder / "annotations" / "instances_train.json").read_text())
    names = [{image["file_name"] for image in part["images"]} for part in parts]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {image["file_name"] for image in whole["images"]}
    assert len(names[1]) == round(len(whole["images"]) / 4)
    assert sum(len(part["annotations"]) for part in parts) == len(whole["annotations"])
    for part in parts:
        ids = {image["id"] for image in part["images"]}
        assert all(box["image_id"] in ids for box in part["annotations"])


@pytest.mark.slow
def test_runs_are_recorded_once_with_their_scores_and_cost(scenes_folder, tmp_path, monkeypatch):
    tiny: dict[str, Any] = {"size": 64, "batch_size": 8, "warmup_steps": 2, "teacher_floor": 0.0}
    monkeypatch.setitem(evidence_plan.SETS, "tiny", Protocol(1, tiny, folder=scenes_folder.name))
    results = tmp_path / "runs.jsonl"
    arguments = ["--data-root", scenes_folder.parent, "--work", tmp_path / "work", "--results", results]
    arguments += ["--sets", "tiny", "--seeds", "1", "--study", "cross-head", "--jobs", "2"]
    texts = [str(argument) for argument in arguments]
    assert evidence.main(texts) == 0
    lines = sorted((json.loads(line) for line in results.read_text().splitlines()), key=lambda line: -len(line["run"]))
    assert [line["run"] for line in lines] == ["tiny/final/one-to-many/1", "tiny/final/cross-head/1"]
    for line in lines:
        summary = json.loads((tmp_path / "work" / line["run"] / "summary.json").read_text())
        known = {name: value for name, value in summary["scores"].items() if value is not None}
        assert {name: line["scores"][name] for name in known} == pytest.approx(known, abs=1e-5)
        assert line["cpu_seconds"] > 0.5
        assert line["memory_mb"] > 100
    assert lines[0]["scores_on_training_images"].keys() == lines[0]["scores"].keys()
    assert lines[0]["scores_by_class_alone"]["ap_nms"] != lines[0]["scores"]["ap_nms"]
    before = results.read_text()
    assert evidence.main(texts) == 0
    assert results.read_text() == before


def line(variant: str, seed: int, ap: float, ap_nms: float) -> dict[str, Any]:
    run = Run("bccd", "final", variant, seed)
    rest = {"duplicates": 2.0, **dict.fromkeys(("ap50", "ap_small", "ap_medium", "ap_large"), 0.5)}
    extra = {
        "scores_by_class_alone": {"ap": ap, "ap_nms": ap_nms + 0.01, **rest},
        "scores_on_training_images": {"ap": 0.5, "ap_nms": 0.75},
    }
    return {
        "run": run.key, "data": "bccd", "split": "final", "variant": variant, "seed": seed, "options": run.options,
        "scores": {"ap": ap, "ap_nms": ap_nms, **rest},
        "cpu_seconds": 90.0, "memory_mb": 1536.0,
        **(extra if variant == "one-to-many" else {}),
    }  # fmt: skip


def test_tables_and_plots_say_what_the_lines_say(tmp_path):
    lines = [line("one-to-many", s, 0.2, 0.3 + s / 100) for s in range(3)]
    lines += [line("cross-head", s, 0.33 + s / 100, 0.34) for s in range(3)]
    lines += [line("one-to-many-2x", s, 0.1, 0.35 + s / 100) for s in range(3)]
    results, document = tmp_path / "runs.jsonl", tmp_path / "results.md"
    results.write_text("".join(json.dumps(x) + "\n" for x in lines))
    names = (
        "table: bccd final",
        "gains: bccd,pcb final",
        "gains: bccd final over one-to-many-2x",
        "memory: bccd final",
    )
    document.write_text("before\n" + "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names) + "after\n")
    arguments = ["--results", results, "--document", document, "--images", tmp_path]
    evidence_tables.main([str(argument) for argument in arguments])
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| one-to-many | 30 | 20.0 ± 0.0 | 31.0 ± 1.0 | 50.0 ± 0.0" in text
    assert "| one-to-many, ranked by class alone | 30 | 20.0 ± 0.0 | 32.0 ± 1.0 |" in text
    assert "| cross-head | 30 + 30 | 34.0 ± 1.0 | 34.0 ± 0.0 |" in text
    assert "| 1.5 | 3 |" in text  # GiB, seeds
    assert "| cross-head | +2.0 ± 0.0 | **+2.0** ± 0.0 |" in text  # seed by seed, over the better ranking
    assert "| one-to-many, twice as long, with NMS | +4.0 ± 0.0 | **+4.0** ± 0.0 |" in text
    assert "| cross-head | -2.0 ± 0.0 | **-2.0** ± 0.0 |" in text  # over the longer baseline
    assert text.index("| cross-head | +2.0") < text.index("| one-to-many | -12.0")  # the best first
    assert "| bccd | one-to-many | 75.0 ± 0.0 | 31.0 ± 1.0 |" in text
    assert Path(tmp_path / "results-bccd.png").stat().st_size > 5000
    evidence_tables.main([str(argument) for argument in arguments])
    assert document.read_text() == text
