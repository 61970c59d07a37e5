"""Named settings, as data: weights of so many bits, activations of 16.

Group sizes and symmetry are those that compressed-tensors and auto-round give the same names.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "W2A16": {"bits": 2, "group_size": 128, "sym": True},
    "W3A16": {"bits": 3, "group_size": 128, "sym": True},
    "W4A16": {"bits": 4, "group_size": 128, "sym": True},
    "W8A16": {"bits": 8, "group_size": -1, "sym": True},
}
