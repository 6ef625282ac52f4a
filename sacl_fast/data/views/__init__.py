"""What is done to a picture: the random augmentation of its two views.

``tables.py`` holds the published settings. ``draw.py`` draws what is random about a view and
applies the draw with torchvision. The compiled operator (``compiled.py``) and DALI's graph
(``dali.py``, the only module that imports DALI) apply the same draws to whole batches;
``dali_parameters.py`` makes arrays of the draws for the latter.

A new operation is a field of ``ViewConfig``, a line in ``draw_view`` and one in ``apply_view`` of
``draw.py``, which is the reference, and then the same in the other two.
"""
