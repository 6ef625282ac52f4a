"""``sacl-fast cache``: decode any source once, into the file of ``data/images/pixel_format.py``."""
