"""What a run learns from, known by its content: a resumed run must not go on with anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from coco_example.data.reader import CocoIndex
from coco_example.data.values import Identifier
from coco_example.files import digest

__all__ = ["describe_data", "describe_teacher", "differences"]


def describe_data(index: CocoIndex | None) -> dict[str, Any]:
    """Describe the images of a split by ids, names, counts and boxes, wherever their folder is; empty for none."""
    if index is None:
        return {}
    categories = [[category.id, category.name] for category in index.categories]
    images = [[record.id, record.path.name, record.boxes, record.labels] for record in index.records]
    return {
        "images": len(images),
        "boxes": sum(len(record.boxes) for record in index.records),
        "categories": categories,
        "digest": digest([categories, images]),
    }


def describe_teacher(teacher: nn.Module | None, labels: Mapping[int, Identifier]) -> dict[str, Any]:
    """Describe a teacher by its weights and the category of each of its labels."""
    return {} if teacher is None else {"digest": digest([teacher.state_dict(), dict(labels)])}


def differences(then: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List what differs between two descriptions, by name: the first as it was read from a file."""
    found = []
    for name, new in now.items():
        old = then.get(name)
        old = old if isinstance(old, dict) else {}
        if old.get("digest") != new.get("digest"):
            shown = [_difference(f"{name} {part}", old.get(part), new[part]) for part in new if part != "digest"]
            found += list(filter(None, shown)) or [f"{name}: of other content"]
    return found


def _difference(name: str, old: Any, new: Any) -> str:
    if old == new:
        return ""
    if isinstance(old, list) and isinstance(new, list):  # the entries that only one of the two has
        old, new = ([entry for entry in mine if entry not in other][:3] for mine, other in ((old, new), (new, old)))
    return f"{name}: {old!r:.80} then, {new!r:.80} now"
