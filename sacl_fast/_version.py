"""The version, in one place: read by the build as text and by the package at run time."""

__version__ = "0.1.0"
