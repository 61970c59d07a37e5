"""Every error this package raises on purpose.

    WoqError
    |-- ConfigError          a configuration value is wrong, unknown or contradicts another one
    |-- CalibrationError     calibration data is missing, empty, unusable, or gave non-finite values
    |-- QuantizationError    a weight or layer cannot be quantized as asked
    |-- CheckpointError      a folder or file is missing, malformed, truncated or does not fit the model
    `-- BackendError         no backend can run a layer here, or one computed something wrong

A message says what failed, where (the layer's or the file's name), what was got, what is allowed, and what to
do about it. `hint` holds the last part, so that the command line can print it on a line of its own.
"""

from __future__ import annotations


class WoqError(Exception):
    """Base of all errors raised by `woq`."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")
        self.message = message
        self.hint = hint


class ConfigError(WoqError, ValueError):
    """A configuration value is wrong, unknown, or contradicts another one."""


class CalibrationError(WoqError, ValueError):
    """Calibration data is missing, empty, unusable, or gave non-finite activations."""


class QuantizationError(WoqError, RuntimeError):
    """A weight or a layer cannot be quantized as asked."""


class CheckpointError(WoqError, ValueError):
    """A checkpoint is missing, malformed, truncated, or does not fit the model."""


class BackendError(WoqError, RuntimeError):
    """No backend can run a layer here, or a backend's result differs from the reference."""
