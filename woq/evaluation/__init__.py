"""Measuring what quantization costs: perplexity, and divergence from the original model."""

from woq.evaluation.divergence import Divergence, compare
from woq.evaluation.perplexity import Perplexity, perplexity
from woq.evaluation.windows import windows_from_text

__all__ = ["Divergence", "Perplexity", "compare", "perplexity", "windows_from_text"]
