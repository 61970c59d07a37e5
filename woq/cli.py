"""The command line: `woq quantize | inspect | convert | eval | doctor | demo`. Options become config fields or arguments of the
Python functions that do the work; defaults stand there, not here.

Every error of `woq.errors` is printed as a message and a hint, exit code 2; `woq --debug ...` shows the traceback.
Heavy modules are imported by the command that needs them, so that `woq --help` answers at once.
"""

from __future__ import annotations

import json
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from woq.configs import PRESETS, ConfigWarning, QuantConfig, config_from_dict, preset
from woq.configs.base import json_object
from woq.console import (
    print_conversion,
    print_diagnosis,
    print_error,
    print_facts,
    print_folder,
    print_note,
    print_report,
    print_selftest,
    weight_bytes,
)
from woq.errors import ConfigError, WoqError
from woq.interop import TARGETS


class _Commands(TyperGroup):
    """Turns our errors into messages and exit code 2, and our warnings into lines."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("default", ConfigWarning)
            try:
                return super().invoke(ctx)
            except WoqError as error:
                if ctx.params["debug"]:
                    raise
                print_error(error)
                raise typer.Exit(2) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print_note("warning", str(message))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Offload(StrEnum):
    """When a float model's blocks stay on disk until they are needed."""

    auto = "auto"
    always = "always"
    never = "never"


Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:<index> or xpu.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FolderOrId = Annotated[str, typer.Argument(help="Folder or hub id.")]


@app.callback()
def _options(debug: Debug = False) -> None:
    """Weight-only quantization of language models."""


# --- quantize ----------------------------------------------------------------------------------------------------


@app.command()
def quantize(
    source: FolderOrId,
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    method: Annotated[str | None, typer.Option(help="Algorithm: gptq unless a config says; rtn needs no data.")] = None,
    bits: Annotated[int | None, typer.Option(help="Width of a code, 2 to 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Features that share a scale; -1: per channel.")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Symmetric, or a zero point a group.")] = None,
    preset_name: Annotated[str | None, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with fields; options override it.")] = None,
    dataset: Annotated[str | None, typer.Option(help="File, data set name or hub id; left out: the model itself.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration samples.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sample.")] = None,
    fields: Annotated[list[str] | None, typer.Option("--set", help="field=value, any field of the config; JSON or text.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to quantize; left out: INC_TARGET_DEVICE, else the best.")] = None,
    dtype: Dtype = "auto",
    offload: Annotated[Offload, typer.Option(help="Leave blocks on disk until needed.")] = Offload.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target when all is done.")] = False,
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Quantize SOURCE into the folder TARGET."""
    options = {
        "bits": bits, "group_size": group_size, "sym": sym, "dataset": dataset, "num_samples": num_samples,
        "seq_len": seq_len, "device": device,
    }  # fmt: skip
    made = build_config(method, preset_name, config, options, fields or [])
    from woq.inspection import inspect_folder
    from woq.loading import resolve_folder
    from woq.modeling import quantize_folder

    folder = resolve_folder(source, {})
    report = quantize_folder(
        folder,
        target,
        made,
        dtype=dtype,
        offload=offload.value,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    print_report(folder, target, made, report, inspect_folder(target, trust_remote_code=trust_remote_code))


def build_config(
    method: str | None,
    preset_name: str | None,
    file: Path | None,
    options: dict[str, Any],
    assignments: list[str],
) -> QuantConfig:
    """The config that a command line asks for: preset, then file, then options, then --set. Raises ConfigError."""
    data = json_object(_read(file)) if file is not None else {}
    data |= {name: value for name, value in options.items() if value is not None}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected field=value")
        data[name] = _value(text)
    found = data.pop("quant_method", None)
    name = method or found or "gptq"
    if preset_name is not None:
        return preset(preset_name, name, **data)
    return config_from_dict({**data, "quant_method": name})


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself: 3, true, [..] and {..} need no quotes, words neither."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


# --- inspect -----------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    folder: FolderOrId,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Tell what FOLDER holds, what is unusual about it, and which backend would run it here."""
    from woq.inspection import inspect_folder
    from woq.loading import is_gguf, resolve_folder

    where = Path(folder) if is_gguf(Path(folder)) else resolve_folder(folder, {})
    facts = inspect_folder(where, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(facts.to_dict(), indent=2))
    else:
        print_folder(facts)


# --- convert -----------------------------------------------------------------------------------------------------


@app.command()
def convert(
    source: FolderOrId,
    target: Annotated[Path, typer.Argument(help="Folder, or file, to write.")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target when all is done.")] = False,
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Write the quantized SOURCE, of any format that woq reads, in another format: without loss, or not at all."""
    from woq.interop.convert import convert as run
    from woq.loading import resolve_folder

    folder = resolve_folder(source, {})
    done = run(folder, target, to, resume=resume, overwrite=overwrite, trust_remote_code=trust_remote_code)
    print_conversion(done, weight_bytes(folder), weight_bytes(target))


# --- export ------------------------------------------------------------------------------------------------------


export = typer.Typer(no_args_is_help=True, help="Write a model for another runtime.")
app.add_typer(export, name="export")


@export.callback()
def _export() -> None:
    """Write a model for another runtime."""


@export.command()
def onnx(
    source: FolderOrId,
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target when all is done.")] = False,
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """SOURCE, quantized or float, as an ONNX decoder with a key-value cache for ONNX Runtime."""
    from woq.export.onnx import export_onnx

    error = export_onnx(source, target, overwrite=overwrite, trust_remote_code=trust_remote_code)
    checked = f"off by {error:.1e} of their norm, run in ONNX Runtime"
    print_facts(str(target), [("weights", f"{weight_bytes(target) / 1e6:.1f} MB"), ("logits", checked)])


# --- eval, doctor, demo ------------------------------------------------------------------------------------------


@app.command("eval")
def evaluate(
    folder: FolderOrId,
    reference: Annotated[str | None, typer.Option(help="The float original: adds KL divergence and top-1 agreement.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to evaluate on.")] = None,
    tokens: Annotated[str | None, typer.Option(help="FILE.safetensors[:tensor] of token ids [windows, length].")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window of text; left out: 2048, or what the model has.")] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use the first windows only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows, or requests of a task, at once.")] = 8,
    tasks: Annotated[str | None, typer.Option(help="lm-eval's tasks instead, with commas between.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Of tasks: examples in a prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of tasks: samples at most, to try.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Task files of your own, in place of lm-eval's.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Annotated[str, typer.Option(help="auto, or a name that `woq doctor` lists.")] = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Perplexity of FOLDER in the standard protocol: non-overlapping windows, every next token scored. Or lm-eval's tasks."""
    from woq.evaluation.folders import Request, evaluate_folder
    from woq.evaluation.harness import by_figure, evaluate_tasks

    result: dict[str, Any]
    request = Request(
        text=text, tokens=tokens, seq_len=seq_len, max_windows=max_windows, batch_size=batch_size
    )
    options = {"device_map": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if tasks is None:
        result = evaluate_folder(folder, reference, request, backend=backend, **options)
    else:
        if (text, tokens, reference) != (None, None, None):
            raise ConfigError(
                "--tasks bring their own text", hint="leave out --text, --tokens and --reference"
            )
        how = {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "batch_size": batch_size,
            "task_folder": task_folder,
        }
        found = evaluate_tasks(folder, tasks.split(","), backend=backend, loading=options, **how)
        result = found if as_json else by_figure(found)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_facts(folder, [(name.replace("_", " "), str(value)) for name, value in result.items()])


@app.command()
def doctor(
    selftest: Annotated[bool, typer.Option("--selftest", help="Run every kernel and check it; a report to post.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Which devices and backends work here, and why the others do not. --selftest: exit code 1 if one is wrong."""
    from dataclasses import asdict

    from woq.doctor import diagnose

    if selftest:
        _selftest(as_json)
        return
    found = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        print_diagnosis(found)


def _selftest(as_json: bool) -> None:
    """Run it, print it, and end with exit code 1 where a kernel is wrong."""
    from woq.selftest import report, run_selftest, summarize

    rows = run_selftest()
    found = report(rows)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_selftest(summarize(rows), [row for row in rows if not row.passed])
    if not found["passed"]:
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; left out: SmolLM2-135M-Instruct.")] = None,
    out: Annotated[Path, typer.Option(help="Where models are put.")] = Path("demo"),
    text: Annotated[Path | None, typer.Option(help="Text to evaluate on; left out: text the model writes itself.")] = None,
) -> None:  # fmt: skip
    """Quantize a small chat model, save, reload, measure, and let it answer."""
    from woq.demo import run

    run(model, out, text)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
