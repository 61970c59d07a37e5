"""What importing costs: nothing heavy is loaded, nothing native is built, no device is started."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "triton",
    "datasets",
    "torch",
    "transformers",
    "accelerate",
    "rich",
    "typer",
    "woq.algorithms",
    "woq.backends",
)

PROBE = """
import json, sys
{statement}
loaded = [name for name in sys.modules if name.split(".")[0] in {roots!r} or name.startswith("woq.")]
torch = sys.modules.get("torch")
started = torch is not None and (torch.cuda.is_initialized() or torch.xpu.is_initialized())
print(json.dumps({{"loaded": loaded, "started": started}}))
"""


def after(statement: str) -> tuple[set[str], bool]:
    """Modules of interest loaded by `statement` in a fresh interpreter, and whether a device was started."""
    roots = {name.partition(".")[0] for name in HEAVY} - {"woq"}
    script = PROBE.format(statement=statement, roots=roots)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return set(found["loaded"]), found["started"]


def test_import_woq_loads_nothing_heavy() -> None:
    loaded, started = after("import woq")
    assert loaded == {"woq.hooks"}  # the standard library's import machinery, nothing else
    assert not started


@pytest.mark.parametrize(
    "statement",
    [
        "from woq import GPTQConfig; GPTQConfig(bits=3)",
        "from woq import ConfigError, preset; preset('W4A16')",
    ],
)
def test_configs_need_no_torch(statement: str) -> None:
    loaded, _ = after(statement)
    assert not {name for name in loaded if name.split(".")[0] != "woq"}


def test_running_a_model_loads_no_algorithm_no_triton_and_starts_no_device() -> None:
    loaded, started = after("from woq import AutoModelForCausalLM, QuantLinear, save_pretrained")
    assert "torch" in loaded  # the probe sees what it should
    assert not {name for name in loaded if name.startswith(("woq.algorithms", "triton.", "datasets."))}
    assert {name for name in loaded if name.startswith("woq.backends.")} <= {"woq.backends.base"}
    assert not started


def test_the_command_line_answers_help_without_torch() -> None:
    loaded, _ = after("import woq.cli")
    assert "torch" not in loaded and "transformers" not in loaded
