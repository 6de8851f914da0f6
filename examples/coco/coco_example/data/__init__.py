"""COCO-format data: reading, loading, augmenting, sampling, and drawing scenes."""
