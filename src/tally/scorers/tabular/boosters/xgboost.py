"""Models of XGBoost: what ``save_model`` writes as JSON and as Universal Binary JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tally.scorers.tabular.boosters.base import Booster, BoosterKind
from tally.scorers.tabular.tables import Array


class XgboostKind(BoosterKind):
    """Models of XGBoost."""

    library, title = "xgboost", "XGBoost"
    distributions: ClassVar[tuple[str, ...]] = ("xgboost", "xgboost-cpu")

    def open(self, path: Path) -> Booster:
        return _Model(path)

    def wrote(self, path: Path) -> str | None:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - 4096, 0))
            found = re.search(rb'"version"\s*:\s*\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)', file.read())
        return b".".join(found.groups()).decode() if found else None


class _Model(Booster):
    dtype = "float32"

    def __init__(self, path: Path) -> None:
        import xgboost

        self._xgboost = xgboost
        model = self._model = xgboost.Booster({"nthread": 1})
        model.load_model(bytearray(path.read_bytes()))  # of a path, it goes by the name
        learner = json.loads(model.save_config())["learner"]
        self.names, self.count = model.feature_names, model.num_features()
        self._types = model.feature_types
        self._objective = learner["objective"]["name"]
        classes = int(learner["learner_model_param"].get("num_class", 0))
        if self._objective == "binary:logistic":
            classes = 2
        self.classes = [str(number) for number in range(classes)] or None
        if any(each == "c" for each in self._types or ()):
            known = model.get_categories(export_to_arrow=True).to_arrow()
            self.texts = [at for at, (_, values) in enumerate(known) if values is not None]
        best = model.attr("best_iteration")
        self._trees = (0, 0) if best is None else (0, int(best) + 1)

    def predict(self, given: Any) -> Array:
        if self.texts:
            given = given.astype({given.columns[at]: "category" for at in self.texts})
        rows = self._xgboost.DMatrix(
            given, feature_names=self.names, feature_types=None if self.texts else self._types,
            missing=np.nan, nthread=1, enable_categorical=True,
        )  # fmt: skip
        margin = self._objective == "multi:softmax"  # which gives the class alone
        found: Array = self._model.predict(rows, output_margin=margin, iteration_range=self._trees)
        if margin:
            found = np.exp(found - found.max(axis=1, keepdims=True))
            found /= found.sum(axis=1, keepdims=True)
        return np.stack([1 - found, found], axis=1) if self.classes and found.ndim == 1 else found
