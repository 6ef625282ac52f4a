"""A trained encoder as files that run without sacl-fast: ``sacl-fast export``."""
