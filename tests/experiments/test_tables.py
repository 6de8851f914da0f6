"""Tables and plots show what the lines hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tables
from plan import Run
from run import RESULTS


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
    arguments = ["--results", results, "--documents", document, "--images", tmp_path]
    tables.main([str(argument) for argument in arguments])
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
    tables.main([str(argument) for argument in arguments])
    assert document.read_text() == text


def test_conversions_are_compared_with_what_they_were_seed_by_seed(tmp_path):
    lines = [line("one-to-many", s, 0.2, 0.3 + s / 100) for s in range(3)]  # by class alone 0.31 + s / 100
    lines += [line("convert-untrained", s, 0.3 + s / 100, 0.3) for s in range(3)]
    lines += [line("convert-10pc", s, 0.35 + s / 100, 0.3) for s in range(2)]
    lines += [line("convert-frozen-10pc", s, 0.3, 0.3) for s in range(2)]
    lines += [line("one-to-many-further-10pc", s, 0.1, 0.33) for s in range(3)]
    lines += [line("convert", 0, 0.36, 0.3), line("convert-class-10pc", 0, 0.4, 0.3)]
    text = tables.conversions(lines, ["bccd"], "final")
    assert "| the detector, with NMS | 32.0 ± 1.0 |  |" in text
    assert "| the detector, without NMS | 20.0 ± 0.0 |  |" in text
    assert "| converted, nothing trained | 31.0 ± 1.0 | -1.0 |" in text
    assert "| converted, 10 % of the epochs | 35.5 ± 0.7 | +4.0 |" in text
    assert "| converted, all of the epochs | 36.0 | +5.0 |" in text
    assert "score of the class alone" not in text
    assert "| one-to-many, trained further, 10 % of the epochs, with NMS | 33.0 ± 0.0 | +1.0 |" in text
    table = tables.table(lines, ["bccd"], "final")
    assert "| converted, nothing trained | 0 + 30 |" in table
    assert "| converted, 10 % of the epochs | 3 + 30 |" in table
    assert tables._share_of("convert-5pc", "convert") == 5
    assert tables._share_of("convert", "convert") == 100
    assert tables._share_of("convert-untrained", "convert") == 0
    assert tables._share_of("convert-frozen-10pc", "convert") is None
    assert tables._share_of("convert-poto-10pc", "convert") is None
    tables.draw_conversions(lines, tmp_path / "convert-curve.png")
    assert (tmp_path / "convert-curve.png").stat().st_size > 5000


def test_notes_of_lines_are_footnotes_of_the_tables_that_show_them(tmp_path):
    noted = {**line("auxiliary-head", 0, 0.2, 0.3), "note": "another head"}
    lines = [
        line("one-to-many", 0, 0.2, 0.3),
        noted,
        line("auxiliary-head", 1, 0.2, 0.3),
        line("cross-head", 0, 0.3, 0.3),
    ]
    for text in (tables.table(lines, ["bccd"], "final"), tables.gains(lines, ["bccd"], "final")):
        assert text.count("†") == 2
        assert "| one-to-one, auxiliary head † |" in text
        assert text.endswith("\n\n† Another head.")
    assert "†" not in tables.table([{**noted, "data": "pcb"}, lines[0]], ["bccd"], "final")
    assert "†" not in tables.table([one for one in lines if one is not noted], ["bccd"], "final")


def test_lines_of_the_older_auxiliary_head_are_marked():
    noted = [one for one in map(json.loads, RESULTS.read_text().splitlines()) if "note" in one]
    assert len(noted) > 40
    for one in noted:
        assert one["options"]["auxiliary_head"]
        assert one["note"] == "recorded with the older auxiliary head, before 2026-11-28"
