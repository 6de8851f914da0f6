"""What to do about numbers of a head that have another shape than they should."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["remedy_of_shape"]

_FOUR = dict.fromkeys(("sides", "bins", "distribution"), "sides")  # what the four are; coordinates otherwise


def remedy_of_shape(name: str, sizes: Sequence[int], shape: Sequence[int | None]) -> str:
    """Tell what to do about the first fault of a shape: a map that is no list of points, another last axis, or A.

    Args:
        name: Of the field: logits, sides, boxes, ….
        sizes: Those that came.
        shape: Those that were expected; None for any size.

    Example:
        >>> remedy_of_shape("sides", (2, 1024, 3), (None, 1024, 4))
        'return four sides in the last dimension'
    """
    # 1. A map (N, C, H, W), where a list of points (N, A, C) was expected.
    if len(sizes) == 4 and len(shape) == 3:
        return "flatten each map with x.flatten(2).transpose(1, 2), then concatenate all levels"
    if len(sizes) == 4 and len(shape) == 2 and name == "quality":
        return "flatten each map with x.flatten(1), then concatenate all levels"

    # 2. As many axes as there should be, or one more or less, and not four or one at the end.
    if len(shape) == 4 and len(sizes) == 3:
        return f"split the last dimension into four sides: {name}.unflatten(-1, (4, -1))"
    if len(sizes) == len(shape) + 1 and sizes[-1] == 1:
        return "drop the last dimension: x.squeeze(-1)"
    fours = [i for i, size in enumerate(shape) if size == 4 and i >= len(shape) - 2]
    if len(sizes) == len(shape) and fours and sizes[fours[-1]] != 4:
        place = "the last dimension" if fours[-1] == len(shape) - 1 else "the last dimension but one"
        return f"return four {_FOUR.get(name, 'coordinates')} in {place}"

    # 3. Else the points are others.
    return "concatenate all levels in one order for every field, with a grid for each"
