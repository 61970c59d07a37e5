"""`neural_compressor.common`: its logger."""

import logging

__all__ = ["logger"]

logger = logging.getLogger("woq.compat.neural_compressor")
