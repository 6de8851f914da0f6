"""Several processes that accumulate batches and compute losses on validation images, as torchrun starts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.engine import training
from coco_example.engine.distributed import ALONE
from coco_example.engine.metrics_log import read_metrics
from coco_example.engine.validation import ValidationLosses
from coco_example.models.methods import build_method
from coco_example.models.saved_model import load_model
from coco_example.options import MethodOptions, Options

from tests.examples.coco.engine.test_accumulate import Linear, options_of, train
from tests.makers.training_runs import assert_same_run

SCRIPT = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import torch
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.engine.distributed import join_workers
from coco_example.engine.metrics_log import MetricsLog
from coco_example.engine.signals import Signals
from coco_example.engine.training import Training
from tests.examples.coco.engine.test_accumulate import Linear, options_of

data, output = map(Path, sys.argv[1:3])
with join_workers() as worker:
    method = Linear()
    index = read_coco(*locate_split(data, "train"))
    exchanges = []
    training = Training(options_of(2, 2), output, method, method, index, worker)
    training.module.register_comm_hook(exchanges, lambda seen, bucket: (seen.append(1), average(bucket))[1])

    def average(bucket):
        tensor = bucket.buffer() / worker.count
        return torch.distributed.all_reduce(tensor, async_op=True).get_future().then(lambda f: f.value()[0])

    with MetricsLog(output, total_steps=3, batch_size=8, enabled=worker.first) as log:
        training.fit(log, lambda _: {}, Signals())
    training.release()
    if worker.first:
        (output / "found.json").write_text(json.dumps([len(exchanges), method.weight.detach().flatten().tolist()]))
"""

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_learn_what_one_does_and_exchange_gradients_once_a_step(script, scenes_folder, tmp_path):
    (tmp_path / "work.py").write_text(SCRIPT)
    paths = [scenes_folder, tmp_path / "two", Path(__file__).parents[4], Path(training.__file__).parents[2]]
    process = script(str(tmp_path / "work.py"), *map(str, paths), module=TORCHRUN)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    exchanges, weights = json.loads((tmp_path / "two" / "found.json").read_text())
    assert exchanges == 3
    index = read_coco(*locate_split(scenes_folder, "train"))
    method = Linear()
    expected, _ = train(tmp_path / "one", options_of(8, 1), method, method, index)
    torch.testing.assert_close(torch.tensor(weights), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_validation_losses_of_two_processes_are_those_of_one_and_a_run_goes_on(
    workshop, script, scenes_folder, tmp_path
):
    options: dict[str, Any] = {"arm": "one-to-one", "epochs": 2, "batch_size": 2, "accumulate": 2, "eval_every": 1}

    def run(folder: Path, *more: str) -> None:
        process = script("train.py", *workshop.arguments(folder, **options), *more, module=TORCHRUN)
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    # 1. The losses at the end are those of the saved detector, in batches of both processes.
    run(tmp_path / "whole")
    lines = [line for line in read_metrics(tmp_path / "whole") if line["kind"] == "validation"]
    assert [(line["step"], line["images"]) for line in lines] == [(3, 8), (6, 8)]
    method = build_method(MethodOptions(arm="one-to-one"), load_model(tmp_path / "whole")[0]).train()
    val = read_coco(*locate_split(scenes_folder, "val"))
    alone = ValidationLosses(Options.from_flat({"batch_size": 4}), val, ALONE)(method)
    assert lines[-1]["losses"] == pytest.approx(alone, rel=1e-4)

    # 2. From the checkpoint of the first epoch on, it ends the same.
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "run.json", "metrics.jsonl"):
        (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (folder / "last.pt").write_bytes((tmp_path / "whole" / "previous.pt").read_bytes())
    run(folder, "--resume")
    assert_same_run(folder, tmp_path / "whole")
    assert [x for x in read_metrics(folder) if x["kind"] == "validation"][-1]["losses"] == lines[-1]["losses"]
