"""A detector of one's own, from its adapter to detections without NMS, in a minute on a CPU.

Everything is in this file: a small detector that is neither FCOS nor RetinaNet, the adapter it needs, pictures that are
drawn, a teacher trained in the ordinary way, one to many, and a student of the same kind that learns one to one with
the teacher's help. ``python examples/custom_detector.py``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crosskd_assign import (
    CrossHeadDistiller,
    DensePredictions,
    DetectorAdapter,
    EndToEndDetector,
    GridLevel,
    TaskAwareOneToOneAssigner,
)
from crosskd_assign.diagnostics import duplicate_report
from crosskd_assign.postprocessing import suppress
from crosskd_assign.structures import Assignment, Batch, Target
from crosskd_assign.testing import check_adapter

STRIDES = (8, 16)
CLASSES = 3
SIZE = 64  # pixels


# --- the detector: one's own, knowing nothing of this library ---------------------------------------------------------


class CellDetector(nn.Module):
    """Every cell of two maps predicts a score for each class, and the centre and the size of a box near it."""

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, 16, 2), _block(16, channels, 2), _block(channels, channels, 2))
        self.down = nn.Sequential(_block(channels, channels, 2), _block(channels, channels, 1))
        last = nn.Conv2d(channels, 4 + CLASSES, 3, padding=1)
        nn.init.constant_(last.bias[4:], -4.0)  # type: ignore[index]  # most cells show nothing
        self.head = nn.Sequential(_block(channels, channels, 1), _block(channels, channels, 1), last)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Compute maps ``(N, channels, H / stride, W / stride)``."""
        fine = self.stem(images)
        return [fine, self.down(fine)]


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.SiLU())


# --- its adapter: all that has to be written --------------------------------------------------------------------------


class CellAdapter(DetectorAdapter):
    """Adapts a `CellDetector` to the library."""

    model: CellDetector

    def features(self, batch: Batch) -> list[Tensor]:
        """Compute the maps that the head starts from."""
        return self.model.pyramid(self.normalize(batch))

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Predict class logits and boxes: a shift of up to one stride from the cell's middle, and a size."""
        levels = [GridLevel.of(x, stride) for x, stride in zip(features, STRIDES, strict=True)]
        out = torch.cat([self.model.head(x).flatten(2).transpose(1, 2) for x in features], dim=1)  # (N, A, 4 + C)
        shift, size = 2 * out[..., :2].sigmoid() - 1, 2 * out[..., 2:4].clamp(max=4).exp()
        return DensePredictions.from_centers(out[..., 4:], torch.cat([shift, size], dim=-1), levels)

    def parts(self) -> dict[str, nn.Module]:
        """Name the modules; `inherit` copies backbone and neck."""
        return {"backbone": self.model.stem, "neck": self.model.down, "head": self.model.head}


def adapted() -> CellAdapter:
    """Build a fresh detector in its adapter."""
    return CellAdapter(CellDetector(), image_mean=(0.3, 0.3, 0.3), image_std=(0.3, 0.3, 0.3), size_divisible=16)


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(count: int, seed: int) -> tuple[list[Tensor], list[Target]]:
    """Draw noisy pictures with one to five filled rectangles in the colours of their classes, some behind others."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        image = 0.5 * torch.rand(3, SIZE, SIZE, generator=generator)
        boxes: list[Tensor] = []
        labels = torch.randint(CLASSES, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator)
        for label in labels.tolist():
            side = torch.randint(10, 33, (2,), generator=generator)
            corner = (torch.rand(2, generator=generator) * (SIZE - side)).long()
            (x1, y1), (x2, y2) = corner.tolist(), (corner + side).tolist()
            image[:, y1:y2, x1:x2] *= 0.6
            image[label, y1:y2, x1:x2] += 0.5
            boxes.append(torch.tensor([x1, y1, x2, y2], dtype=torch.float32))
        images.append(image)
        targets.append(Target(boxes=torch.stack(boxes), labels=labels))
    return images, targets


# --- training ---------------------------------------------------------------------------------------------------------


class OneToMany(TaskAwareOneToOneAssigner):
    """The ordinary way, for the teacher: all points near a centre learn its box, a point near several the smallest.

    A detector of your own brings its own losses, and its teacher is already trained.
    """

    @torch.no_grad()
    def __call__(self, predictions: DensePredictions, targets: Sequence[Target]) -> Assignment:
        """Pair points and boxes of all images."""
        pairs = []
        for i, target in enumerate(targets):
            boxes, points = target["boxes"], predictions.points
            far = (points[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(dim=-1)  # (A, G)
            area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).expand_as(far)
            area = area.masked_fill(far > 1.5 * predictions.strides[:, None], torch.inf)
            smallest, owner = area.min(dim=1)
            point = smallest.isfinite().nonzero()[:, 0]
            pairs.append(torch.stack([torch.full_like(point, i), point, owner[point]]))
        image, point, box = torch.cat(pairs, dim=1)
        nothing = torch.zeros_like(point)
        return Assignment(image, point, box, nothing.float(), nothing.bool())


def train(trainee: nn.Module, data: tuple[list[Tensor], list[Target]], steps: int, name: str) -> float:
    """Train in a plain loop; return the mean loss of the last tenth, over that of the first."""
    optimizer = torch.optim.AdamW([p for p in trainee.parameters() if p.requires_grad], lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: list[float] = []
    for step in range(steps):
        chosen = torch.randint(len(data[0]), (16,)).tolist()
        losses: dict[str, Tensor] = trainee.train()([data[0][i] for i in chosen], [data[1][i] for i in chosen])
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
        history.append(float(total.detach()))
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            terms = "  ".join(f"{key} {float(value.detach()):.3f}" for key, value in losses.items())
            print(f"  {name} {step + 1:4}/{steps}  {terms}")
    tenth = max(1, steps // 10)
    return sum(history[-tenth:]) / sum(history[:tenth])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of each of the two trainings (500)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (0)")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    begun = time.perf_counter()
    training, (images, targets) = draw(600, seed=1), draw(100, seed=2)

    print("1. The adapter is checked")
    report = check_adapter(adapted(), training[0][:2], training[1][:2])
    print(report)
    report.raise_for_problems()

    print("2. A teacher learns one to many")
    teacher = EndToEndDetector(adapted(), assigner=OneToMany(), score_threshold=0.2)
    fell = [train(teacher, training, options.steps, "teacher")]

    print("3. A student learns one to one, with the help of the teacher's head")
    distiller = CrossHeadDistiller(EndToEndDetector(adapted(), score_threshold=0.2), teacher.adapter)
    fell.append(train(distiller, training, options.steps, "student"))

    print(f"4. {len(images)} new pictures")
    with torch.no_grad():
        raw, student = teacher.eval()(images), distiller.eval()(images)
    rows = {
        "teacher, without NMS": raw,
        "teacher, with NMS": [suppress(d) for d in raw],
        "student, without NMS": student,
    }
    reports = {name: duplicate_report(found, targets) for name, found in rows.items()}
    for name, r in reports.items():
        print(f"  {name:22} found {r.found} of {r.objects}, {r.rate:.2f} duplicates for each")
    print(f"{time.perf_counter() - begun:.0f} s")

    before, after = reports["teacher, without NMS"], reports["student, without NMS"]
    if max(fell) >= 1 or not after.rate < before.rate:
        print("sanity check failed: losses should fall, and the student repeat itself less than its teacher")
        return 1
    print("sanity check passed: losses fell, and the student repeats itself less than its teacher")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
