"""The plan: names of variants are understood, fit the training script, and mean what they meant when recorded."""

from __future__ import annotations

import dataclasses
import doctest
import json

import plan
import pytest
from coco_example.command_line import parse_options
from plan import BASES, MODIFIERS, SETS, STUDIES, Modifier, PlanError, Run, given_up, planned, variant
from run import RESULTS, Runner

LINES = [
    json.loads(line)
    for path in sorted(RESULTS.parent.glob("*.jsonl"))
    if path.name != "overlap.jsonl"  # scores of runs, not runs
    for line in path.read_text().splitlines()
]
RECORDED = dict.fromkeys(line["variant"] for line in LINES if not given_up(line["variant"]))
VARIANTS = sorted({*RECORDED, *(name for names in STUDIES.values() for name in names)})
# Teacher and origin of every variant, as they were when the names were a table: recorded lines do not hold them.
TEACHERS = {
    ("", ""): (
        "one-to-many",
        "one-to-many-2x",
        "one-to-many-3x",
        "one-to-one",
        "one-to-one-2x",
        "one-to-one-task-aligned",
        "one-to-one-yolo",
        "one-to-one-ranking",
        "auxiliary-head",
        "auxiliary-head-detached",
        "one-to-many-large",
        "one-to-many-large-2x",
        "cross-head-nanodet",
        "cross-head-nanodet-features",
        "cross-head-nanodet-features-3x",
        "cross-head-nanodet-features-auxiliary",
        "cross-head-nanodet-features-auxiliary-balanced",
        "cross-head-nanodet-features-auxiliary-double",
        "cross-head-nanodet-features-3-auxiliary",
        "cross-head-nanodet-features-auxiliary-3x",
        "cross-head-yolox",
        "cross-head-yolox-features-3x",
        "feature-imitation-nanodet",
        "feature-imitation-nanodet-auxiliary",
        "one-to-many-deep",
    ),
    ("one-to-many-large", ""): (
        "cross-head-large",
        "cross-head-large-decay",
        "feature-imitation-large",
    ),
    ("one-to-many-large", "one-to-many"): (
        "unlabelled-pseudo-large-inherit",
        "cross-head-large-inherit-features-unlabelled-50pc",
        "cross-head-large-inherit-decay-features-unlabelled-50pc",
        "cross-head-large-inherit-decay-ranking",
        "cross-head-large-inherit-decay",
        "cross-head-large-inherit-decay-2x",
        "cross-head-large-inherit-decay-features",
        "cross-head-large-inherit-decay-features-2x",
        "cross-head-large-inherit-decay-features-balanced",
        "cross-head-large-inherit-decay-features-balanced-2x",
        "cross-head-large-inherit-decay-features-balanced-ranking-0.1-2x",
        "cross-head-large-inherit-decay-features-ranking-0.1-2x",
        "cross-head-large-inherit-decay-ranking-2x",
        "cross-head-large-inherit-decay-ranking-0.1-2x",
        "cross-head-large-inherit-decay-double",
        "cross-head-large-inherit-decay-auxiliary",
        "feature-imitation-large-inherit-decay",
        "feature-imitation-large-inherit-decay-2x",
        "weighted-imitation-large-inherit-decay",
    ),
    ("one-to-many-large-2x", "one-to-many"): (
        "cross-head-large-2x-inherit-decay-ranking",
        "cross-head-large-2x-inherit-decay-features-2x",
    ),
    ("", "one-to-many"): (
        "cross-head-nanodet-features-auxiliary-inherit",
        "cross-head-nanodet-inherit-decay",
    ),
    ("one-to-many", ""): (
        "one-to-many-further-10pc",
        "one-to-many-further-25pc",
        "one-to-many-further",
        "one-to-one-inherit-10pc",
        "one-to-one-inherit-25pc",
        "convert-untrained",
        "convert-5pc",
        "convert-10pc",
        "convert-25pc",
        "convert-50pc",
        "convert",
        "convert-frozen-10pc",
        "convert-rate-0.001",
        "convert-class-untrained",
        "convert-class-10pc",
        "convert-class-25pc",
        "convert-class-frozen-10pc",
        "convert-undistilled-10pc",
        "cross-head-inherit-decay-features-unlabelled-50pc",
        "unlabelled-pseudo-inherit",
        "one-to-one-inherit",
        "one-to-one-inherit-2x",
        "one-to-one-inherit-3x",
        "own-head-imitation",
        "cross-head",
        "cross-head-unaligned",
        "cross-head-quality",
        "cross-head-entry-1",
        "cross-head-half",
        "cross-head-warmup",
        "cross-head-ranking",
        "cross-head-auxiliary",
        "cross-head-inherit",
        "cross-head-inherit-decay",
    ),
    ("one-to-many-2x", ""): ("cross-head-2x-teacher",),
    ("one-to-many-deep", ""): (
        "cross-head-deep-entry-0",
        "cross-head-deep-entry-1",
        "cross-head-deep-entry-2",
        "cross-head-deep-entry-3",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_understood_by_the_training_script(name, tmp_path):
    runner = Runner(tmp_path, tmp_path, tmp_path / "runs.jsonl")
    run = Run("bccd", "final", name, 2)
    arguments = ["--output", "x", "--data-path", str(tmp_path), *runner._flags(run.options)]
    if variant(name).converts:
        for file in ("model.json", "config.json"):  # of the detector that is converted
            (tmp_path / file).write_text('{"epochs": 1, "lr": 0.001}')
        arguments += ["--convert", str(tmp_path)]
    else:
        arguments = ["--teacher", "t", *arguments]
    options = parse_options(arguments)
    assert options.seed == 2
    longest = max(1, round(SETS["bccd"].epochs * variant(name).length))
    assert options.training.epochs == (0 if "untrained" in name else longest)
    assert options.as_flat().items() >= variant(name).options.items()
    assert not options.teachers.inherit or run.teacher is not None


def test_every_variant_of_a_set_differs_in_nothing_but_what_it_says():
    for data in SETS:
        common = SETS[data].options
        for name in VARIANTS:
            assert not common.keys() & variant(name).options.keys() - {"head_convs", "lr"}


def test_a_conversion_learns_from_its_twin_and_words_change_its_defaults():
    plain, other = variant("convert-10pc"), variant("convert-undistilled-unselected-poto")
    speed = {"lr": 3e-4, "warmup_steps": 10}
    assert plain.options == {"arm": "cross-head", "metric": "balanced", "selection": True} | speed
    assert other.options == {"arm": "one-to-one", "metric": "poto", "selection": False} | speed
    assert (plain.teacher, other.teacher, plain.converts) == ("one-to-many", "one-to-many", True)
    assert Run("pcb", "final", "convert-5pc", 0).epochs == 1


def test_pseudo_labels_come_from_a_one_to_many_run_and_inheriting_from_the_twin():
    twin, large = variant("unlabelled-pseudo-inherit"), variant("unlabelled-pseudo-large-inherit")
    assert twin.pseudo
    assert large.pseudo
    assert (twin.teacher, twin.origin) == ("one-to-many", "")
    assert (large.teacher, large.origin) == ("one-to-many-large", "one-to-many")
    assert not variant("one-to-one-inherit").pseudo


def test_ways_to_use_images_without_labels_take_as_many_steps_as_those_that_do_not():
    labels = SETS["bccd_10"].labelled
    for name, images_per_epoch in {
        "one-to-one-inherit": labels,
        "cross-head-large-inherit-decay-features-unlabelled-50pc": 2 * labels,  # every other image has none
        "unlabelled-pseudo-inherit": 1.0,
        "unlabelled-pseudo-large-inherit": 1.0,
    }.items():
        assert Run("bccd_10", "final", name, 0).epochs * images_per_epoch == pytest.approx(15)


@pytest.mark.parametrize("name", SETS)
def test_the_larger_network_differs_in_what_its_set_says(name):
    small, large = (Run(name, "final", one, 0).options for one in ("one-to-many", "one-to-many-large"))
    assert large == small | SETS[name].larger != small
    assert large["channels"] >= small.get("channels", 0)  # a set of wider students needs a wider teacher


def test_recorded_runs_are_those_of_the_plan():
    known = [line for line in LINES if line["variant"] in RECORDED]
    assert len(known) > len(LINES) - 10  # a few variants were given up with their code
    for line in known:
        run = Run(line["data"], line["split"], line["variant"], line["seed"])
        assert run.key == line["run"]
        precision = {"precision": line["options"].get("precision")}  # the faster one of the processor
        assert {**run.options, **precision} == {**line["options"], **precision}


def test_names_mean_the_teachers_that_they_meant_when_they_were_recorded():
    assert {name for names in TEACHERS.values() for name in names} >= RECORDED.keys()
    for (teacher, origin), names in TEACHERS.items():
        for name in names:
            assert (variant(name).teacher, variant(name).origin) == (teacher, origin)
            assert variant(name).larger == name.startswith("one-to-many-large")


def test_words_may_stand_in_any_order():
    first = variant("cross-head-large-inherit-decay-features-balanced-ranking-0.1-2x")
    second = variant("cross-head-2x-ranking-0.1-balanced-decay-features-inherit-large")
    assert dataclasses.replace(second, name=first.name) == first
    assert first.title == "cross-head recipe, feature imitation, balanced metric, ranking 0.1, twice as long"


def test_a_length_at_the_end_is_the_students():
    for name, teacher, length in [
        ("cross-head-large-2x", "one-to-many-large", 2),
        ("cross-head-large-2x-decay", "one-to-many-large-2x", 1),
        ("cross-head-large-2x-3x", "one-to-many-large-2x", 3),
    ]:
        assert (variant(name).teacher, variant(name).length) == (teacher, length)
    assert variant("one-to-many-large-2x").length == variant("one-to-one-large-2x-inherit").length == 2


def test_the_twin_has_the_students_network():
    assert variant("cross-head-deep-inherit").teacher == "one-to-many-deep"
    assert variant("cross-head-deep-large-inherit").origin == "one-to-many-deep"
    assert variant("one-to-one-large-inherit").teacher == "one-to-many-large"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"one of the words one-to-many, .* but got ''"),
        ("crosshead", r"one of the words one-to-many, .* but got 'crosshead'"),
        ("cross-headlarge", "but got 'cross-headlarge'"),
        (
            "cross-head-lrage-2x",
            r"one of the words deep, large, .* but got 'lrage-2x' \(variant 'cross-head-lrage-2x'\)",
        ),
        ("cross-head-balanced-0.1", "but got '0.1'"),
        ("cross-head-ranking-ranking-0.1", "but got 'ranking-0.1'"),
        ("one-to-many-", "but got ''"),
        ("one-to-one-2x-teacher", "but got 'teacher'"),
        ("one-to-one-nanodet", "but got 'nanodet'"),
        ("cross-head-half-double", "do not contradict each other"),
        ("cross-head-balanced-yolo", "do not contradict each other"),
        ("cross-head-2x-3x", "do not contradict each other"),
        ("cross-head-large-nanodet", "do not contradict each other"),
        ("cross-head-nanodet-yolox", "do not contradict each other"),
        ("auxiliary-head-auxiliary", "do not contradict each other"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, message):
    with pytest.raises(PlanError, match=message):
        variant(name)


def test_a_new_modifier_is_one_line(monkeypatch):
    monkeypatch.setitem(MODIFIERS, "wide", Modifier("wider", {"channels": 96}, numbered="{:g} wide", network=True))
    wide = variant("cross-head-wide-128-inherit-2x")
    assert (wide.options["channels"], type(wide.options["channels"])) == (128, int)
    assert wide.title == "cross-head, inheriting, twice as long, 128 wide"
    assert wide.teacher == "one-to-many-wide-128"


def test_bases_and_modifiers_have_names_that_can_be_told_apart():
    assert not BASES.keys() & MODIFIERS.keys()
    for word in MODIFIERS:
        assert 1 <= len(word.split("-")) <= 2


@pytest.mark.parametrize("study", STUDIES)
def test_teachers_are_planned_before_their_students_and_once(study):
    runs = list(planned(study, ["bccd", "pcb"], "tune", [0, 1]))
    assert len(set(runs)) == len(runs)
    for i, run in enumerate(runs):
        assert set(run.needs) <= set(runs[:i])
    assert {run.variant for run in runs} >= set(STUDIES[study])


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


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(plan).failed == 0
