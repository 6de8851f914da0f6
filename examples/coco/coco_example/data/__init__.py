"""COCO-format data: finding, reading, judging, loading, augmenting, sampling, and drawing scenes."""
