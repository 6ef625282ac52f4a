"""Where pictures come from. ``open.py`` opens the source that ``data.source`` names, and
``source.py`` says what a source is: images by index, with labels or without.

A new kind of source is one file here, a row in ``SOURCES`` in ``open.py``, and its name in
``SourceName`` in ``config/choices.py``. Images in memory are an ``ArraySource``; where they are
encoded, ``FileSource`` has all but the number, names and identities of the images.
"""
