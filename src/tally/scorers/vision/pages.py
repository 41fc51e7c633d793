"""Each picture of files that hold several: pages of a TIFF, frames of a GIF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from tally.errors import ItemError, ModelRefutedError, SpecError, TallyError
from tally.media import images
from tally.scorers.base import Item, Result, Results, Row, Scorer
from tally.scorers.vision.around import Around


class Pages(Around):
    """Gives the rows of another scorer for each picture of a file, with its number as ``page``, from 0.

    One picture that fails makes its file dead: part of its rows would pass for all. Pictures are decoded a batch at a
    time, so that a file of a thousand needs no more memory than one of a few. Raises SpecError for a scorer that takes
    no pictures, or gives pictures.
    """

    def __init__(self, scorer: Scorer) -> None:
        name = type(scorer).__name__
        if scorer.input != "image":
            raise SpecError(f"pages: is for pictures, and {name} takes {scorer.input!r}")
        if scorer.output == "image":
            raise SpecError(
                f"pages: the results of {name} are pictures, and each file has one",
                hint="Score the rows, or split the files into one for each page.",
            )
        super().__init__(scorer)
        self.columns = None if scorer.columns is None else {"page": "int64", **scorer.columns}

    def prepare(self, item: Item) -> Item:
        return item

    def score(self, batch: Sequence[Item]) -> Results:
        return [self._file(item) for item in batch]

    def _file(self, item: Item) -> Result:
        pictures, rows, page = self._pictures(item), list[Row](), 0
        try:
            while part := list(islice(pictures, self.scorer.batch_size)):
                results = self.scorer.score([self.scorer.prepare(each) for each in part])
                if not isinstance(results, Sequence) or len(results) != len(part):
                    return ItemError(f"{item.key}: not one result for each of its pictures")
                for result in results:
                    if isinstance(result, Exception):
                        return ItemError(f"page {page}: {result}")
                    found = [result] if isinstance(result, Mapping) else result
                    if not isinstance(found, Sequence):
                        return ItemError(f"page {page}: the result is no rows")
                    rows += [{"page": page, **row} for row in found]
                    page += 1
        except ModelRefutedError:
            raise
        except TallyError as error:
            return error
        return rows

    def _pictures(self, item: Item) -> Iterator[Item]:
        if not isinstance(item.value, (bytes, bytearray, memoryview)):
            yield item
            return
        for picture, info in images.each_page(
            bytes(item.value),
            self.scorer.size,
            max_pixels=self.decoding.max_pixels,
            background=self.decoding.background,
            tell=self.assume,
        ):
            yield Item(item.key, picture, {**info, **item.info})

    def describe(self) -> str:
        return f"{self.scorer.describe()}, each page"
