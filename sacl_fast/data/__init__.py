"""From files to batches, in three rooms:

- ``images``: where pictures come from.
- ``views``: what is done to a picture.
- ``loading``: batches, by worker processes and by DALI.

``images`` and ``views`` do not know one another; ``loading`` uses both. A batch's way:
``images.open.open_sources`` opens a source, ``loading.open.open_view_loader`` makes a loader of it,
and the loader gives batches of two views.
"""
