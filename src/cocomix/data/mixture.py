"""Draw documents from several sources in given proportions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from cocomix.common.settings import Range

Item = TypeVar("Item")


@dataclass
class TextSource:
    """One of several sources of a corpus.

    Attributes:
        source: file, folder, `python-stdlib` or `hf:NAME`, as `corpus.source`.
        text_field: the field of a record that holds the text.
        weight: amount of its text relative to the other sources' weights. By default all of its text is read.
    """

    source: str
    text_field: str = "text"
    weight: Annotated[float, Range(0, 10**6, open_low=True)] | None = None


def mixed(sources: Sequence[Iterator[Item]], weights: Sequence[float], size: Callable[[Item], int]) -> Iterator[Item]:
    """Draw items from several iterators so that the sizes drawn from each are proportional to its weight.

    The next item comes from the iterator with the smallest size drawn so far divided by its weight, ties to the
    first. Drawing stops when one ends, so the proportions hold to within an item of each.
    """
    drawn = [0] * len(sources)
    while True:
        number = min(range(len(sources)), key=lambda each: drawn[each] / weights[each])
        item = next(sources[number], None)
        if item is None:
            return
        drawn[number] += size(item)
        yield item
