from __future__ import annotations

import numpy as np
import pytest
from coco_example.data.reader import read_coco
from PIL import Image

from tests.makers.coco_files import box, document, image, write_dataset

# Rectangles of image 1, of which pixels and boxes have to agree after every transform: colour, label, xyxy.
RECTANGLES = (((0, 255, 0), 1, (20, 30, 70, 60)), ((255, 0, 0), 2, (100, 10, 120, 80)))


@pytest.fixture
def index(tmp_path):
    """Nine images with zero, one or two boxes."""
    annotations = [box(n, (10 * n, 5 * n, 30, 20), 1 + n % 2) for n in range(1, 9)] + [box(3, (1, 2, 50, 60))]
    return read_coco(*write_dataset(tmp_path, document(map(image, range(1, 10)), annotations, ((1, "a"), (2, "b")))))


@pytest.fixture
def rectangles(tmp_path):
    """One black image with the coloured rectangles."""
    annotations = [box(1, (x1, y1, x2 - x1, y2 - y1), label) for _, label, (x1, y1, x2, y2) in RECTANGLES]
    paths = write_dataset(tmp_path, document([image(1)], annotations, ((1, "green"), (2, "red"))))
    pixels = np.zeros((120, 160, 3), np.uint8)
    for colour, _, (x1, y1, x2, y2) in RECTANGLES:
        pixels[y1:y2, x1:x2] = colour
    Image.fromarray(pixels).save(paths[0] / "1.png")
    return read_coco(*paths)
