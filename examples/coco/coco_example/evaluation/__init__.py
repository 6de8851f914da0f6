"""Scoring detectors by the COCO protocol."""
