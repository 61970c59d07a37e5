"""Folds: rescalings inside a block that leave its output as it is. See docs/folds.md."""

from woq.folds.find import FoldFinder
from woq.folds.fold import Fold, Folds

__all__ = ["Fold", "FoldFinder", "Folds"]
