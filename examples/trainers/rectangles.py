"""Made-up pictures, and a small detector to find what is in them: what the loops of this folder train on.

In their place you have your own data set and your own detector, torchvision's or one with an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parents[1]))

from custom_detector import CellAdapter, adapted, draw

from crosskd_assign import CrossHeadDistiller, EndToEndDetector
from crosskd_assign.structures import Target

__all__ = ["Rectangles", "collate", "new_distiller", "new_teacher", "write_yolo"]

Sample = tuple[Tensor, Target]


class Rectangles(Dataset[Sample]):
    """``count`` pictures of 64 pixels with filled rectangles in the colours of three classes."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.images, self.targets = draw(count, seed)

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Return a picture and its boxes."""
        return self.images[index], self.targets[index]


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Target]]:
    """Put samples side by side in lists: pictures may differ in size, and in the number of their boxes."""
    return [image for image, _ in samples], [target for _, target in samples]


def new_teacher(seed: int = 1) -> CellAdapter:
    """Build the teacher. This one is untrained, to be quick; load the weights of yours here."""
    torch.manual_seed(seed)
    teacher = adapted()
    *_, last = teacher.model.head.children()
    last.get_parameter("bias").data[4:] = -1.0  # sure of something, so that it has what to teach
    return teacher


def new_distiller(seed: int = 0) -> CrossHeadDistiller:
    """Build student and teacher."""
    teacher = new_teacher()
    torch.manual_seed(seed)
    return CrossHeadDistiller(EndToEndDetector(adapted(), score_threshold=0.05), teacher)


def write_yolo(folder: Path, *, train: int = 64, val: int = 16) -> Path:
    """Write rectangles in YOLO's format: pictures, a text file for each, and the YAML file that is returned."""
    for split, count in (("train", train), ("val", val)):
        for name in ("images", "labels"):
            (folder / name / split).mkdir(parents=True, exist_ok=True)
        for i, (image, target) in enumerate(zip(*draw(count, seed=len(split)), strict=True)):
            save_image(image, folder / "images" / split / f"{i}.png")
            low, high = target["boxes"][:, :2], target["boxes"][:, 2:]
            rows = torch.cat([(low + high) / 2, high - low], dim=1) / image.shape[-1]  # fractions of the picture
            lines = [
                f"{label} " + " ".join(f"{number:.6f}" for number in row)
                for label, row in zip(target["labels"].tolist(), rows.tolist(), strict=True)
            ]
            (folder / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    file = folder / "rectangles.yaml"
    file.write_text(f"path: {folder.absolute()}\ntrain: images/train\nval: images/val\nnames: [red, green, blue]\n")
    return file
