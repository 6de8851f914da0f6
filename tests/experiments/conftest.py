from __future__ import annotations

from pathlib import Path

import pytest
from coco_example.data.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes of 64 pixels to train on, and 8 to evaluate on."""
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=24, val=8, size=64)
