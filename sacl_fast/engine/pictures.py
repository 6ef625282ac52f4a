"""The pictures in a run folder: a courtesy, so that one that cannot be drawn is a warning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from sacl_fast.config import Config
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.contact_sheet import contact_sheet
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.plots import plot_curves
from sacl_fast.engine.run_folder import CURVES, METRICS, VIEWS
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import whole_file

logger = logging.getLogger(__name__)

_PAUSE = 10.0  # s between drawings of the curves; one takes 0.3 s, an epoch may take less


class Pictures:
    """Those of one run; ``drawn`` by the first rank."""

    def __init__(self, config: Config, folder: Path, source: Source, *, drawn: bool) -> None:
        self._config, self._folder, self._source, self._drawn = config, folder, source, drawn
        self._curves_due, self._curves_at = False, time.monotonic()

    def draw_views(self) -> None:
        """Both views of some images."""

        def draw(path: Path) -> None:
            with whole_file(path) as file:
                contact_sheet(self._source, self._config).save(file, "PNG")

        self._draw(VIEWS, draw)

    def draw_curves(self) -> None:
        """The metrics so far; by ``close`` where it is soon after the last time."""
        self._curves_due = True
        if time.monotonic() - self._curves_at >= _PAUSE:
            self.close()

    def close(self) -> None:
        """Draw what is due."""
        if self._curves_due:
            self._draw(CURVES, lambda path: plot_curves(read_metrics(self._folder / METRICS), path))
            self._curves_due, self._curves_at = False, time.monotonic()

    def _draw(self, name: str, draw: Callable[[Path], None]) -> None:
        if not self._drawn:
            return
        try:
            draw(self._folder / name)
        except (OSError, UserError) as error:
            why = reason_of(error) if isinstance(error, OSError) else error
            logger.warning("cannot write %s: %s", self._folder / name, why)
