"""Reading in pieces: what json.loads reads, errors included, wherever a piece ends, in a fraction of the memory."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coco_example.data import tables
from coco_example.data.reader import read_coco
from coco_example.data.tables import Table, read_tables
from coco_example.errors import DataError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.makers.coco_files import box, document, image, write_dataset

FIELDS = {"images": ("id", "b"), "annotations": ("id",)}
PIECES = (4, 7, 64)  # bytes; an encoding takes four to know

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))
entries = st.lists(st.dictionaries(st.sampled_from(["id", "b", "c"]), values, max_size=3) | values, max_size=4)
documents = st.dictionaries(st.sampled_from(["images", "annotations", "info"]), entries | values, max_size=3) | values


def at_once(data: bytes) -> str:
    """What a file holds under FIELDS, by json.loads alone; as a text, for NaN is not equal to itself."""
    content = json.loads(data)
    found = {}
    for name, fields in FIELDS.items():
        rows = content.get(name) if isinstance(content, dict) else None
        if isinstance(rows, list):
            known = [row if isinstance(row, dict) else {} for row in rows]
            rows = {field: [row.get(field) for row in known] for field in fields}
        found[name] = rows
    return repr(found)


def outcome(read: Callable[[Any], str], source: Any) -> str:
    """What is read, or the parser's error."""
    try:
        return read(source)
    except DataError as error:
        return str(error).partition("but got ")[2].rpartition(" (")[0]
    except ValueError as error:
        return str(error)


def in_pieces(path: Path) -> str:
    read = read_tables(path, FIELDS)
    found = {name: dict(t.columns) if isinstance(t, Table) else t for name, t in read.items()}
    return repr(dict.fromkeys(FIELDS) | found)


@pytest.mark.parametrize("piece", PIECES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=documents, indent=st.sampled_from([None, 0, 2]), encoding=st.sampled_from(["utf-8-sig", "utf-16-le"]))
def test_any_document_is_read_as_at_once(tmp_path, monkeypatch, piece, content, indent, encoding):
    monkeypatch.setattr(tables, "_PIECE", piece)
    data = json.dumps(content, indent=indent).encode(encoding)
    (tmp_path / "a.json").write_bytes(data)
    assert in_pieces(tmp_path / "a.json") == at_once(data)


TEXTS = [
    '{"images": [{"id": 1}, {"id": 2, "b": -1.5e3}], "images": [{"id": 3}]}',  # the last of two counts
    ' {"info":1,"annotations" : [ {"id":"\\ud83d\\ude00]}"} , 5 ] } ',
    '{"images":[1,-Infinity,NaN,true],"annotations":[],"x":12}',
    "[]",
    "12",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_that_is_cut_off_or_goes_on_anywhere_has_the_parsers_own_error(tmp_path, monkeypatch, text):
    monkeypatch.setattr(tables, "_PIECE", 5)
    path = tmp_path / "a.json"
    for broken in {*(text[:n] for n in range(len(text))), text + ",", text.replace(":", ";"), text.replace("}", "},")}:
        path.write_text(broken)
        assert outcome(in_pieces, path) == outcome(at_once, broken.encode())


def test_polygons_take_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_PIECE", 1 << 16)
    rows = [{**box(1, (1, 2, 3, 4)), "segmentation": [[float(n)] * 400]} for n in range(1000)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document([image(1)], rows)))
    tracemalloc.start()
    columns = read_tables(path, {"annotations": ("bbox",)})["annotations"].columns
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert columns["bbox"] == [[1, 2, 3, 4]] * 1000
    assert peak < path.stat().st_size / 2  # at once it is several times the file
    assert gc.isenabled()


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_counts_the_bytes_on_a_terminal_alone(tmp_path, monkeypatch, progress):
    seen: dict[str, Any] = {"bytes": 0}

    class Bar:
        def __init__(self, **options: Any) -> None:
            seen.update(options)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            seen["bytes"] += count

    monkeypatch.setattr(tables, "tqdm", Bar)
    monkeypatch.setattr(tables, "_PIECE", 50)
    paths = write_dataset(tmp_path, document([image(1)], [box(1, (1, 2, 3, 4))] * 9))
    read_coco(*paths, progress=progress)
    assert seen["bytes"] == seen["total"] == paths[1].stat().st_size
    assert seen["disable"] is (None if progress else True)  # None: tqdm asks whether it writes to a terminal


def test_the_records_of_a_large_set_are_a_few_objects_that_processes_can_share(tmp_path):
    """A process that is forked copies the memory of each Python object that it looks at."""
    content = document([image(n) for n in range(1, 301)], [box(1 + n % 300, (1, 2, 3, 4)) for n in range(900)])
    images, annotations = write_dataset(tmp_path, content, files=False)
    for entry in content["images"]:
        (images / entry["file_name"]).touch()
    records = read_coco(images, annotations).records
    reached, left = set(), [records]
    while left:
        one = left.pop()
        if id(one) not in reached and not isinstance(one, type):
            reached.add(id(one))
            left += gc.get_referents(one)
    assert len(reached) < 60
    assert [record.id for record in records] == list(range(1, 301))
    assert [len(record.boxes) for record in records] == [3] * 300
