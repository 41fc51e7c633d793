"""Models of CatBoost: what ``save_model`` writes in its own format (``.cbm``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tally.errors import ModelLoadError
from tally.scorers.tabular.boosters.base import Booster, BoosterKind
from tally.scorers.tabular.tables import Array

_INDEPENDENT = ("MultiLogloss", "MultiCrossEntropy")
"""Losses of classes that do not exclude each other."""


class CatboostKind(BoosterKind):
    """Models of CatBoost."""

    library, title = "catboost", "CatBoost"
    distributions: ClassVar[tuple[str, ...]] = ("catboost",)

    def open(self, path: Path) -> Booster:
        return _Model(path)

    def wrote(self, path: Path) -> str | None:
        found = re.search(rb"CatBoost release ([\d.]+\d)", path.read_bytes())
        return found[1].decode() if found else None


class _Model(Booster):
    dtype = "float32"
    missing_texts = False

    def __init__(self, path: Path) -> None:
        import catboost

        found = catboost.CatBoost().load_model(str(path))
        names, self.count = list(found.feature_names_), len(found.feature_names_)
        self.names = None if names == [str(at) for at in range(self.count)] else names
        if found.get_embedding_feature_indices():
            raise ModelLoadError(
                f"{path} takes vectors as columns, which tables do not hold", hint="A scorer of your own can run it."
            )
        self._categories = list(found.get_cat_feature_indices())
        self._words = list(found.get_text_feature_indices())
        self.texts = sorted([*self._categories, *self._words])
        tells_apart = len(found.classes_) > 0
        self._tells = tells_apart
        if tells_apart and found.get_all_params().get("loss_function") not in _INDEPENDENT:
            self.classes = [str(each) for each in found.classes_]
        kind = catboost.CatBoostClassifier if tells_apart else catboost.CatBoostRegressor
        self._model = kind().load_model(str(path))
        self._pool = catboost.Pool

    def predict(self, given: Any) -> Array:
        if self.texts:
            given = self._pool(given, cat_features=self._categories, text_features=self._words, thread_count=1)
        ask = self._model.predict_proba if self._tells else self._model.predict
        return np.asarray(ask(given, thread_count=1))
