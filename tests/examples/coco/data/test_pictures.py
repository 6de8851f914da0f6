"""One decoder for all pictures: large ones are read, and those that are something else are named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_example.data import pictures
from coco_example.data.pictures import check_pictures, read_picture
from coco_example.errors import DataError
from PIL import Image, ImageFile


def write_png(path: Path, width: int, height: int) -> Path:
    """A grey PNG of any size whose file is small, as a decompression bomb is; the pixels end early."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_a_large_picture_of_the_annotated_size_is_no_attack(tmp_path):
    size = (20_000, 20_000)  # Pillow's own limit is 179 million pixels
    path = write_png(tmp_path / "large.png", *size)
    check_pictures([path], [size])
    with pytest.raises(DataError, match=r"300×200 pixels, but got 20000×20000 \(.*large\.png\)"):
        read_picture(path, (300, 200))  # without decoding 1.2 GB
    with pytest.raises(DataError, match=r"at most 178,956,970 pixels, but got 20000×20000 \(.*large\.png\)"):
        read_picture(path)


def test_pixels_come_as_they_are_stored_with_or_without_an_annotated_size(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "_MOST_PIXELS", 1200)
    for size in (None, (40, 30)):
        assert torch.equal(read_picture(tmp_path / "a.png", size), torch.from_numpy(pixels).permute(2, 0, 1))
    monkeypatch.setattr(pictures, "_MOST_PIXELS", 1199)
    read_picture(tmp_path / "a.png", (40, 30))
    with pytest.raises(DataError, match=r"at most 1,199 pixels, but got 40×30"):
        read_picture(tmp_path / "a.png")


def test_a_file_that_decodes_to_another_size_than_it_says_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "convert", lambda *_: Image.new("RGB", (80, 60)), raising=False)
    with pytest.raises(DataError, match=r"40×30 pixels, but got 80×60 \(.*a\.png\)"):
        read_picture(tmp_path / "a.png", (40, 30))


def test_sixteen_bits_are_refused_for_prediction_too(tmp_path):
    Image.fromarray(np.full((30, 40), 1000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"8 bits per channel, but got mode I;16 .*a\.png"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="8 bits per channel"):
        check_pictures([tmp_path / "a.png"], [(40, 30)])


def test_a_picture_that_is_none_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for check in (read_picture, lambda p: check_pictures([p], [(1, 1)])):
        with pytest.raises(DataError, match=r"a readable image, but got .*a\.png"):
            check(tmp_path / "a.png")
