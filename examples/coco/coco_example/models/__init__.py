"""Detectors, training methods and teachers."""
