"""From sources to batches on the device. ``open.py`` chooses who makes the views.

``ViewLoader`` (``view_loader.py``) gives the batches of pre-training. It takes them from a
``Stream``, which makes the views by torchvision or by Pillow and the compiled operator (both
``torchvision_stream.py``), by DALI (``dali_stream.py``), or of images that are pixels by the
operator alone (``pixel_stream.py``; where those pixels are: ``residence.py``); all streams follow
the ``Plan`` of ``batch.py``. ``EvalLoader`` (``evaluation.py``) gives the batches of an evaluation.

Below them, a reader (``readers.py``, ``dali_reader.py``) reads the images of one batch. A
``Prefetcher`` (``workers.py``) lets it read ahead in worker processes (``worker_process.py``), and
they hand over batches through memory (``handover.py``). Every wait ends (``waiting.py``).

Another way to make views is one file with a ``Stream``, its choice in ``resolve_loader`` and
``open_view_loader`` (``open.py``), and its name in ``LoaderName`` in ``config/choices.py``.
"""
