"""Models of LightGBM: the text that ``save_model`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tally.errors import ModelLoadError
from tally.scorers.tabular.boosters.base import Booster, BoosterKind
from tally.scorers.tabular.tables import Array

_CLASSES = ("binary", "multiclass", "softmax", "multiclassova", "multiclass_ova", "ova", "ovr")


class LightgbmKind(BoosterKind):
    """Models of LightGBM."""

    library, title = "lightgbm", "LightGBM"
    distributions: ClassVar[tuple[str, ...]] = ("lightgbm",)

    def open(self, path: Path) -> Booster:
        return _Model(path)


def _checked(text: str) -> dict[str, str]:
    """What stands before the trees. Raises ValueError unless these are all there: the library crashes otherwise."""
    head, begin, _ = text.partition("\nTree=")
    fields = dict(line.partition("=")[::2] for line in head.splitlines())
    length = sum(map(int, fields["tree_sizes"].split()))
    trees = text.encode()[len(head.encode()) + 1 :] if begin else b""
    if not trees[length:].lstrip().startswith(b"end of trees"):
        raise ValueError(f"its trees are not the {length} bytes that it promises")
    return fields


class _Model(Booster):
    def __init__(self, path: Path) -> None:
        import lightgbm

        text = path.read_text("utf-8")
        head = _checked(text)
        self._model = lightgbm.Booster(model_str=text)
        names, self.count = self._model.feature_name(), self._model.num_feature()
        self.names = None if names == [f"Column_{at}" for at in range(self.count)] else names
        if head.get("objective", "").split(" ")[0] in _CLASSES:
            self.classes = [str(number) for number in range(max(2, int(head["num_class"])))]
        if self._model.pandas_categorical:
            infos = head["feature_infos"].split(" ")
            self.texts = [at for at, info in enumerate(infos) if not info.startswith("[") and info != "none"]
            if len(self.texts) != len(self._model.pandas_categorical):
                raise ModelLoadError(
                    f"{path}: which of its columns are categories is not told: {len(self._model.pandas_categorical)} "
                    f"lists of categories, and {len(self.texts)} columns that have some",
                    hint="Train it with the categories as whole numbers, or score it with a scorer of your own.",
                )

    def predict(self, given: Any) -> Array:
        if self.texts:
            given = given.astype({given.columns[at]: "category" for at in self.texts})
        found: Array = np.asarray(self._model.predict(given, num_threads=1))
        return np.stack([1 - found, found], axis=1) if self.classes and found.ndim == 1 else found
