"""Half and double precision, a teacher that nothing changes, and two processes that do what one would."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from crosskd_assign import AuxiliaryHead, CrossHeadDistiller, CrossHeadLoss, EndToEndDetector
from crosskd_assign.structures import Target
from tests.makers.small_models import MAKERS, backward, gradients, scene, small_fcos, small_retinanet, snapshot, total

SIZES = ((64, 90), (75, 64))
PAIRS = [("fcos", "fcos"), ("fcos", "retinanet_v2"), ("retinanet", "fcos")]
HALVES = [torch.bfloat16, torch.float16]


def pair(student: str = "fcos", teacher: str = "fcos", **options: Any) -> CrossHeadDistiller:
    options = {"loss": CrossHeadLoss(quality=int(teacher == "fcos"))} | options  # RetinaNet has no quality branch
    return CrossHeadDistiller(MAKERS[student](seed=1), MAKERS[teacher](seed=2), **options).train()


def unsupported(error: RuntimeError) -> bool:
    """Whether this build of torch has no such operator for half precision on a CPU."""
    return "not implemented for" in str(error)


# --- autocast and casts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_autocast_gives_float32_losses_close_to_those_of_float32(student, teacher, dtype):
    images, targets = scene(SIZES)
    distiller = pair(student, teacher)
    exact = distiller(images, targets)
    try:
        with torch.autocast("cpu", dtype=dtype):
            features = distiller.detector.adapter.features(distiller.detector.adapter.preprocess(images)[0])
            losses = distiller(images, targets)
        backward(losses)
    except RuntimeError as error:
        if unsupported(error):
            pytest.skip(str(error))
        raise
    assert features[0].dtype == dtype, "autocast was not on"
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.05, atol=0.01, msg=f"{name}: {loss} for {exact[name]}")
    reached = gradients(distiller)
    assert set(reached) == {name for name, p in distiller.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in reached.values())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_losses_of_half_precision_predictions_are_those_of_the_same_numbers_in_float32(dtype):
    images, targets = scene(SIZES)
    distiller = pair()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        run = distiller.detector.run(images, targets)
        maps, teacher = distiller.teacher_pass(run.batch)
        cross = distiller.run_teacher_head(distiller.aligner(run.maps, maps), run.batch.image_size)
    losses = distiller.detector.losses(replace(run, predictions=cross)), distiller.loss(cross, teacher)
    assert cross.logits.dtype == dtype, "autocast was not on"
    full = []
    for p in (teacher, cross):
        assert p.quality is not None
        full.append(replace(p, logits=p.logits.float(), quality=p.quality.float()))
    expected = distiller.detector.losses(replace(run, predictions=full[1])), distiller.loss(full[1], full[0])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_detector_cast_to_half_precision_detects_the_same_in_float32_pixels(kind, dtype):
    images, _ = scene(SIZES)
    detector = EndToEndDetector(MAKERS[kind](min_size=128, max_size=256), top_k=5).eval()
    with torch.no_grad():
        exact = detector(images)
        try:
            found = detector.to(dtype)([image.to(dtype) for image in images])
        except RuntimeError as error:
            if unsupported(error):
                pytest.skip(str(error))
            raise
    for mine, reference in zip(found, exact, strict=True):
        assert mine["boxes"].dtype == mine["scores"].dtype == torch.float32
        torch.testing.assert_close(mine["scores"], reference["scores"], atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_a_model_cast_before_it_is_wrapped_is_as_good_as_one_cast_afterwards(dtype):
    images = [image.to(dtype) for image in scene(SIZES)[0]]
    with torch.no_grad():
        before = EndToEndDetector(small_fcos().to(dtype), top_k=5).eval()(images)
        after = EndToEndDetector(small_fcos(), top_k=5).to(dtype).eval()(images)
    torch.testing.assert_close(before, after)
    CrossHeadDistiller(small_fcos(1).to(dtype), small_fcos(2).to(dtype))


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_step_in_double_precision_stays_in_double_precision(student, teacher):
    images, targets = scene(SIZES)
    distiller = pair(student, teacher)
    exact = distiller(images, targets)
    distiller.double()
    doubles: list[Target] = [{**t, "boxes": t["boxes"].double()} for t in targets]
    losses = distiller([image.double() for image in images], doubles)
    backward(losses)
    for name, loss in losses.items():
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss.float(), exact[name], rtol=1e-3, atol=1e-4)
    before = snapshot(distiller)
    torch.optim.SGD(distiller.parameters(), lr=0.1).step()
    assert any(not torch.equal(value, before[name]) for name, value in snapshot(distiller).items())
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in distiller.parameters())


@pytest.mark.parametrize("cast", ["double", "half", "bfloat16", "meta", "inside another module"])
def test_the_teacher_follows_its_distiller(cast):
    distiller = CrossHeadDistiller(small_fcos(1), small_fcos(2, channels=64, norm="batch"))
    tensors = [*distiller.teacher.parameters(), *distiller.teacher.buffers()]
    assert {x.dtype for x in tensors} == {torch.float32, torch.int64}
    if cast == "meta":
        distiller.to("meta")
    elif cast == "inside another module":
        nn.Sequential(distiller).double()
    else:
        getattr(distiller, cast)()
    own, theirs = ({(x.dtype, x.device) for x in module.parameters()} for module in (distiller, distiller.teacher))
    assert own == theirs
    assert own != {(torch.float32, torch.device("cpu"))}
    assert not any(p.requires_grad for p in distiller.teacher.parameters())


# --- the teacher stays as it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reach", ["nobody", "the adapter", "the model", "its backbone", "a layer of its head"])
@pytest.mark.parametrize("maker", [small_fcos, small_retinanet], ids=["fcos", "retinanet"])
def test_no_training_changes_the_teacher_whoever_calls_train_on_it(maker, reach, autocast):
    images, targets = scene(SIZES)
    teacher = maker(2, norm="batch")
    distiller = CrossHeadDistiller(small_fcos(1, norm="batch"), teacher)
    before, expected = snapshot(teacher), distiller.train()(images, targets)
    modules = {
        "the adapter": distiller.teacher,
        "the model": teacher,
        "its backbone": teacher.backbone,
        "a layer of its head": teacher.head.classification_head.conv[1],
    }
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        distiller.train()
        if reach in modules:
            modules[reach].train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = distiller(images, targets)
        if step == 0 and not autocast:
            torch.testing.assert_close(losses, expected)  # batch statistics would give others
        optimizer.zero_grad()
        backward(losses)
        optimizer.step()
    for name, value in snapshot(teacher).items():
        assert torch.equal(value, before[name]), name
    assert not gradients(teacher)


# --- two processes ----------------------------------------------------------------------------------------------------

SIZE = ((64, 96),) * 2
# Boxes of rank 0's two images and of rank 1's.
CASES: dict[str, tuple[int, ...]] = {
    "detector": (2, 1, 3, 3),
    "distiller": (2, 1, 3, 3),
    "other channels": (1, 3, 2, 1),
    "missing levels": (1, 3, 2, 1),
    "a rank without boxes": (3, 2, 0, 0),
    "statistics": (2, 1, 3, 3),
    "statistics and features": (2, 1, 3, 3),
    "fewer objects than ranks": (1, 0, 0, 0),
    "an auxiliary head": (2, 1, 3, 3),
    "inside the head": (2, 1, 3, 3),
    "a rank without labels": (2, 1, 3, 3),
    "images without labels": (2, 1, 3, 3),
}
# Of these, the images without labels of each rank.
UNLABELLED = {"a rank without labels": ((), (0, 1)), "images without labels": ((0,), (1,))}


def build(case: str) -> nn.Module:
    student = small_fcos(1)
    if case in ("detector", "an auxiliary head"):
        return EndToEndDetector(student, auxiliary=AuxiliaryHead(student) if case == "an auxiliary head" else None)
    if case == "other channels":
        torch.manual_seed(0)
        return CrossHeadDistiller(student, small_retinanet(2, channels=64), alignment="none")
    if case == "inside the head":
        return CrossHeadDistiller(student, small_fcos(2), alignment="none", entry=1)
    if case == "statistics and features":
        return CrossHeadDistiller(student, small_fcos(2), feature_weight=1.0)
    if case in UNLABELLED:
        return CrossHeadDistiller(EndToEndDetector(student, auxiliary=AuxiliaryHead(student)), small_fcos(2))
    levels = 3 if case == "missing levels" else 5
    alignment: Any = "statistics" if case in ("statistics", "fewer objects than ranks") else "none"
    return CrossHeadDistiller(student, small_fcos(2, levels=levels), alignment=alignment, loss=CrossHeadLoss(quality=1))


def half_batch(case: str, rank: int) -> tuple[list[Tensor], list[Target | None]]:
    images, targets = scene(SIZE, boxes=CASES[case][2 * rank : 2 * rank + 2], seed=rank)
    without = UNLABELLED.get(case, ((), ()))[rank]
    return images, [None if i in without else target for i, target in enumerate(targets)]


def work(rank: int, folder: str) -> None:
    """One of two processes: leave losses and gradients of every case in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(Path(folder) / "meeting").as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for case in CASES:
        model = DistributedDataParallel(build(case))
        for _ in range(2):  # a parameter that was left out is noticed in the second step
            model.zero_grad()
            losses = model(*half_batch(case, rank))
            backward(losses)
        results[case] = ({name: loss.detach() for name, loss in losses.items()}, gradients(model.module))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes computed: ``[{case: (losses, gradients)}, …]``."""
    folder = tmp_path_factory.mktemp("ranks")
    context = start_processes(work, (str(folder),), nprocs=2, join=False)  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + 150
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail("two processes did not finish in 150 s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_agree_on_gradients_without_looking_for_unused_parameters(ranks, case):
    (_, first), (_, second) = (results[case] for results in ranks)
    trainable = {name for name, p in build(case).named_parameters() if p.requires_grad}
    assert set(first) == set(second) == trainable
    for name in trainable:
        assert first[name].isfinite().all()
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_would_from_the_whole_batch(ranks, case):
    model = build(case)
    (images, targets), (more, others) = half_batch(case, 0), half_batch(case, 1)
    losses = model(images + more, targets + others)
    backward(losses)
    (one, theirs), (other, _) = (results[case] for results in ranks)
    assert abs(float(total(one) - total(other))) > 0.01, "the ranks saw the same, so the mean shows nothing"
    for name, loss in losses.items():
        torch.testing.assert_close((one[name] + other[name]) / 2, loss.detach(), atol=1e-4, rtol=1e-4)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(theirs[name], gradient, atol=1e-4, rtol=1e-3, msg=name)
