"""Classes that a user names on the command line, as labels."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from coco_example.data.values import Identifier
from coco_example.errors import RunError, printable

__all__ = ["labels_of"]


def labels_of(
    wanted: Sequence[str] | None, names: Mapping[int, str], ids: Mapping[int, Identifier] | None = None
) -> tuple[int, ...] | None:
    """Find the labels of classes that are named, or given by their id; None if none is.

    Args:
        wanted: Names, in any capitals, or ids. A name comes before an id.
        names: Name of each label.
        ids: Category id of each label; the label itself by default.

    Raises:
        RunError: A class is unknown.
    """
    if wanted is None:
        return None
    by_id = {str(identifier): [label] for label, identifier in (ids or {label: label for label in names}).items()}
    by_name: dict[str, list[int]] = {}
    for label, name in names.items():
        by_name.setdefault(name.casefold(), []).append(label)
    found: list[int] = []
    for word in wanted:
        labels = by_name.get(word.casefold()) or by_id.get(word)
        if labels is None:
            near = difflib.get_close_matches(word.casefold(), by_name, n=3, cutoff=0.5) or sorted(by_name)[:5]
            listed = ", ".join(names[by_name[name][0]] for name in near)
            raise RunError(
                expected="names or ids of classes of the detector",
                got=printable(word),
                where="--classes",
                fix=f"choose among {listed}" + (", …" if len(near) < len(by_name) else ""),
            )
        found += labels
    return tuple(sorted(set(found)))
