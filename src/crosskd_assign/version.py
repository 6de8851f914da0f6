"""The version, in one place: hatchling reads it, exported files name it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
