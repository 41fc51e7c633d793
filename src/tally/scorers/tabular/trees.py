"""Decision trees that came from a file of unknown origin, checked before anything walks them.

scikit-learn follows a tree's child and feature indices in compiled code that does not check them, so a made-up tree
can read memory that is not its own, or never end. Here every index is checked before the first prediction.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

TYPES = ("sklearn.tree._tree.Tree", "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor")
"""Types whose objects :func:`check_trees` vouches for."""


class UncheckedTreeError(ValueError):
    """A tree stands where this module does not know how it is going to be used."""


def check_trees(model: Any) -> None:
    """Check every tree in ``model``, however deep.

    Raises ValueError when a tree is damaged, UncheckedTreeError when it cannot be vouched for.
    """
    from sklearn.ensemble._gb import BaseGradientBoosting
    from sklearn.ensemble._hist_gradient_boosting.gradient_boosting import BaseHistGradientBoosting
    from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
    from sklearn.tree import BaseDecisionTree
    from sklearn.tree._tree import Tree

    found, checked = [], set()
    for each in _objects(model):
        if isinstance(each, (Tree, TreePredictor)):
            found.append(each)
        elif isinstance(each, BaseDecisionTree) and hasattr(each, "tree_"):
            _check_tree(each.tree_, _width(each))
            checked.add(id(each.tree_))
        elif isinstance(each, BaseGradientBoosting) and hasattr(each, "estimators_"):
            # hands its own rows to the trees' arrays, past the trees' own checks
            trees = each.estimators_
            shape = (len(trees), getattr(each, "n_trees_per_iteration_", None))
            if not isinstance(trees, np.ndarray) or trees.shape != shape:
                raise ValueError("the trees of a gradient boosting model do not have the shape that it gives")
            for tree in trees.flat:
                if not isinstance(tree, BaseDecisionTree):
                    raise ValueError(f"a {type(tree).__name__} stands in place of a tree")
                _check_tree(tree.tree_, _width(each))
        elif isinstance(each, BaseHistGradientBoosting) and hasattr(each, "_predictors"):
            if getattr(each, "_preprocessor", None) is not None or getattr(each, "_in_fit", False):
                raise UncheckedTreeError("histogram gradient boosting with categorical features")
            for tree in (tree for row in each._predictors for tree in row):
                if not isinstance(tree, TreePredictor):
                    raise ValueError(f"a {type(tree).__name__} stands in place of a tree")
                nodes = tree.nodes
                _check_nodes(nodes["left"], nodes["right"], nodes["feature_idx"], nodes["is_leaf"] == 0, _width(each))
                if nodes["is_categorical"].any():
                    raise UncheckedTreeError("histogram gradient boosting with categorical features")
                checked.add(id(tree))
    if any(id(each) not in checked for each in found):
        raise UncheckedTreeError("a tree outside any known kind of model")


def _objects(root: Any) -> Iterator[Any]:
    """Everything that can be reached from an object, itself included, code and classes left out."""
    waiting, seen = [root], {id(root): root}
    while waiting:
        each = waiting.pop()
        yield each
        # the garbage collector knows what objects hold, except arrays
        inner = list(each.flat) if isinstance(each, np.ndarray) and each.dtype.hasobject else gc.get_referents(each)
        for value in inner:
            if id(value) not in seen and not isinstance(value, (type, FunctionType, ModuleType, str, bytes)):
                seen[id(value)] = value  # kept, so that no other object gets its id
                waiting.append(value)


def _width(model: Any) -> int:
    """The number of columns that a model takes, which it checks itself whenever it predicts."""
    width = getattr(model, "n_features_in_", None)
    if not isinstance(width, int):
        raise ValueError(f"a {type(model).__name__} does not say how many features it takes")
    return width


def _check_tree(tree: Any, width: int) -> None:
    _check_nodes(tree.children_left, tree.children_right, tree.feature, tree.children_left != -1, width)


def _check_nodes(left: Any, right: Any, feature: Any, inner: Any, width: int) -> None:
    """Children stand behind their parents, so that every walk ends; all indices lie inside."""
    count = len(inner)
    parents = np.flatnonzero(inner)
    if count == 0:
        raise ValueError("a tree has no nodes")
    for children in (left[inner].astype(np.int64), right[inner].astype(np.int64)):
        if (children <= parents).any() or (children >= count).any():
            raise ValueError(f"a tree of {count} nodes has a child that is not one of them, or not below its parent")
    features = feature[inner].astype(np.int64)
    if (features < 0).any() or (features >= width).any():
        raise ValueError(f"a tree asks for a feature that is not one of the {width}")
