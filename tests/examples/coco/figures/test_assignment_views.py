"""What the assignment picture shows is where the detector really looks."""

import pytest
import torch
from coco_example.evaluation.evaluation import Detector
from coco_example.figures.report import assignment_views
from torch import nn

from crosskd_assign import DensePredictions, DetectorAdapter, GridLevel, TaskAwareOneToOneAssigner

BOX = torch.tensor([[16.0, 16.0, 80.0, 72.0]])


class OneHotPoint(DetectorAdapter):
    """Predicts the right box everywhere, but is sure of the class at a single point."""

    def __init__(self, level, point):
        super().__init__(nn.Conv2d(3, 1, 1))
        self.level, self.point = level, point

    def features(self, batch):
        return [batch.images]

    def head(self, features, image_size):
        logits = torch.full((1, len(self.level), 2), -6.0)
        logits[0, self.point, 1] = 4.0
        return DensePredictions.on_grid(logits, BOX.expand(1, len(self.level), 4), [self.level])


@pytest.mark.parametrize("origin", [0.0, 4.0])
@pytest.mark.parametrize("point", [5 * 12 + 6, 5 * 12 + 5])
def test_the_heat_peaks_at_the_point_that_is_assigned(origin, point):
    level = GridLevel(12, 12, 8.0, (8.0, 8.0), (origin, origin))
    detector = Detector(OneHotPoint(level, point))
    target = {"boxes": BOX, "labels": torch.tensor([1])}
    (view,) = assignment_views(detector, [torch.rand(3, 96, 96)], [target], TaskAwareOneToOneAssigner())
    torch.testing.assert_close(view.points, level.points()[[point]])
    y, x = divmod(int(view.heat.argmax()), 96)
    assert abs(x + 0.5 - view.points[0, 0]) <= 1
    assert abs(y + 0.5 - view.points[0, 1]) <= 1
    assert not view.fallback.any()
