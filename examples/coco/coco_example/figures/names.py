"""Names of boxes in a picture, each where it can be read."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

__all__ = ["Names"]

_LINES = (0, 1, -1, 2, -2, 3, -3, 4, -4)  # that a name moves down, to the first place that is free
_COVERED = 0.2  # share of a name that another may cover


class Names:
    """The names in a cell, none upon another: of two boxes at one place both are seen.

    Args:
        axes: The cell. Its y axis points down.
    """

    def __init__(self, axes: Axes) -> None:
        self._frame, self._to_data = axes.bbox, axes.transData.inverted()
        self._taken: list[Bbox] = []

    def add(self, text: Text) -> None:
        """Take a name in, and move it by a few lines if it and another would cover each other."""
        usual = text.get_window_extent().padded(2)  # pixels, with the margin of its tag
        places = [usual.translated(0, -lines * usual.height) for lines in _LINES]
        place = next((place for place in places if self._is_free(place)), usual)
        (_, y), (_, moved) = self._to_data.transform([(0, usual.y0), (0, place.y0)])
        text.set_y(text.get_position()[1] + moved - y)
        self._taken.append(place)

    def _is_free(self, place: Bbox) -> bool:
        inside = self._frame.y0 <= place.y1 - place.height / 2 <= self._frame.y1
        return inside and not any(_shared(place, other) > _COVERED for other in self._taken)


def _shared(one: Bbox, other: Bbox) -> float:
    """Compute the share of the smaller of two boxes that the other covers."""
    common = Bbox.intersection(one, other)
    areas = [box.width * box.height for box in (one, other)]
    return 0.0 if common is None else common.width * common.height / min(areas)
