"""Unreadable images: counted, the first ones named, and an error where they are too many.

A batch may meet more of them than it drew: where an image cannot be read, its neighbours are tried,
so a folder that is gone is found whole at once. So there are two limits: one on all unreadable
images that were met, and one on those that were drawn, which allows for chance.

Training, evaluation and other readers of one source count for themselves, since each reads other
images, and name an image between them once: what was named is kept with the source.
"""

from __future__ import annotations

import logging
import math
from weakref import WeakKeyDictionary

from sacl_fast.checks import counted
from sacl_fast.data.images.source import Source, Subset
from sacl_fast.errors import UserError

logger = logging.getLogger(__name__)

_NAMED = 5  # each in a line of its own; then a line whenever they have doubled
# As many unreadable images, or more, come by chance once in a million samples.
_RARE = math.log(1e6)
_NAMED_OF: WeakKeyDictionary[Source, set[int]] = WeakKeyDictionary()
"""Of each source, itself no subset of one: the images that the log has named."""


class BadImages:
    """The unreadable images of a source; up to a share of ``max_share`` is allowed.

    ``sample``: only so many images are looked at. Of those, more may be unreadable, as far as
    chance explains it.
    """

    def __init__(self, source: Source, max_share: float, *, sample: int | None = None) -> None:
        self.source, self.max_share, self.sample = source, max_share, sample
        self.count = len(source) if sample is None else sample
        self.reasons: dict[int, str] = {}
        """Index to reason."""
        self._whole = _whole_source(source)
        self._named = _named_of(self._whole)
        self._drawn = self._missed = 0

    def add(self, found: list[tuple[int, str]]) -> None:
        """Count images, and why they are unreadable. UserError where they are too many."""
        for index, reason in found:
            if index not in self.reasons:
                self.reasons[index] = reason
                self._name(index, reason)
        if not found:
            return
        bad = len(self.reasons)
        most = self.max_share * self.count
        too_many = bad > most if self.sample is None else _is_rare(bad, self.count, self.max_share)
        if too_many or bad == self.count:
            raise self.too_many()

    def too_many(self) -> UserError:
        """What to raise where there is no batch for them."""
        bad = len(self.reasons)
        least = "" if bad == self.count else "at least "
        return UserError(self._sentence(f"{least}{bad} of {counted(self.count, 'image')}"))

    def drew(self, count: int, missed: int) -> None:
        """Count a batch: of ``count`` images drawn at random, ``missed`` were unreadable. UserError
        as soon as it is all but certain that too many of all images are."""
        self._drawn += count
        self._missed += missed
        if missed and _is_rare(self._missed, self._drawn, self.max_share):
            raise UserError(
                self._sentence(f"{self._missed} of the first {self._drawn} images drawn")
            )

    def _name(self, index: int, reason: str) -> None:
        """Tell of an image that no reader has met before."""
        name, place = self.source.name(index), _place(self.source, index)
        if place in self._named:
            return
        self._named.add(place)
        nth, count = len(self._named), len(self._whole)
        if nth <= _NAMED:
            logger.warning("skipped unreadable image %s: %s (%d of %d)", name, reason, nth, count)
        elif nth % _NAMED == 0 and (nth // _NAMED).bit_count() == 1:
            logger.warning(
                "skipped %d unreadable images of %d so far, the last %s: %s",
                *(nth, count, name, reason),
            )

    def _sentence(self, which: str) -> str:
        names = [f"{self.source.name(i)} ({why})" for i, why in list(self.reasons.items())[:3]]
        more = ", ..." if len(self.reasons) > len(names) else ""
        share = (
            f"data.max_bad_share is {self.max_share:g}" if self.max_share < 1 else "none is left"
        )
        return f"{which} are unreadable, which is too many ({share}): {', '.join(names)}{more}"


def _whole_source(source: Source) -> Source:
    while isinstance(source, Subset):
        source = source.source
    return source


def _place(source: Source, index: int) -> int:
    """Where in the whole source an image is."""
    while isinstance(source, Subset):
        source, index = source.source, int(source.indices[index])
    return index


def _named_of(whole: Source) -> set[int]:
    try:
        return _NAMED_OF.setdefault(whole, set())
    except TypeError:  # somebody's source, which has no weak references or no hash
        return set()


def _is_rare(bad: int, drawn: int, share: float) -> bool:
    """Whether ``bad`` of ``drawn`` images are more than chance explains, if ``share`` of all images
    are bad.

    Chernoff's bound, which Hoeffding (1963) showed for drawing without replacement: as many or
    more come with a probability of at most exp(-drawn KL(bad / drawn || share)).
    """
    if not bad or bad <= share * drawn:
        return False
    if share <= 0:
        return True
    found = bad / drawn
    divergence = found * math.log(found / share)
    if found < 1:
        divergence += (1 - found) * math.log((1 - found) / (1 - share))
    return drawn * divergence > _RARE
