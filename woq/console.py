"""How commands print: tables on stdout, everything else on stderr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from woq.errors import WoqError

if TYPE_CHECKING:
    from woq.configs import QuantConfig
    from woq.doctor import Diagnosis
    from woq.inspection import Facts, Kind
    from woq.interop.convert import Conversion
    from woq.plan import Choice
    from woq.report import Report
    from woq.selftest import Row, Summary


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data")


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Two columns: what, and what it is."""
    print_table(title, ("", ""), facts)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; numbers are the caller's to format."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns)
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


def print_error(error: WoqError) -> None:
    """The message, and the hint on a line of its own."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(error.message)}")
    if error.hint is not None:
        console.print(f"[bold]hint:[/] {escape(error.hint)}")


def print_note(kind: str, message: str) -> None:
    """A line on stderr: "warning: ...", "note: ..."."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold yellow]{kind}:[/] {escape(message)}")


def human(size: float) -> str:
    """Bytes for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in `folder`, or of the file: what a checkpoint's size is compared by."""
    files = folder.iterdir() if folder.is_dir() else [folder]
    return sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS)


def short_type(bits: int, data_type: str) -> str:
    """A column of bits, the width alone where codes are whole numbers."""
    return {"int": str(bits), "int_float_zeros": f"{bits}, float zeros"}.get(data_type, data_type)


# --- what commands found ------------------------------------------------------------------------------------------


def print_report(source: Path, target: Path, config: QuantConfig, report: Report, facts: Facts) -> None:
    """What a quantization run did, and what to do next."""
    from woq.progress import peak_memory
    from woq.saving import LAYERS

    before, after = weight_bytes(source), weight_bytes(target)
    layers = sorted(report.layers, key=lambda layer: -layer.loss)
    mean = sum(layer.loss for layer in layers) / len(layers)
    worst = "\n".join(f"{layer.loss:.3g}  {layer.layer}" for layer in layers[:3])
    rows = [
        ("config", ", ".join(f"{key}={value}" for key, value in config.to_diff_dict().items())),
        ("layers", f"{len(layers)}, {report.plan.coverage:.1%} of the blocks' weights"),
        (
            "left in float",
            "\n".join(f"{n}: {why}" for n, why in list(report.plan.skipped.items())[:5]) or "none",
        ),
        *([("bits chosen", _chosen(report.mixed_precision))] if report.mixed_precision else []),
        ("bits per weight", f"{facts.bits_per_weight:.2f} in quantized layers, scales included"),
        ("size of weights", f"{human(before)} -> {human(after)}"),
        ("calibration", report.calibration),
        ("mean loss", f"{mean:.3g}"),
        ("worst layers", worst),
        (
            "notes",
            "\n".join(f"{count} layers: {note}" for note, count in report.note_counts.items()) or "none",
        ),
        ("time", f"{report.seconds:.1f} s on {report.device}"),
        ("memory", peak_memory()),
        ("every layer", str(target / LAYERS)),
    ]
    print_facts(f"{target} is ready", rows)
    Console(soft_wrap=True).print(
        f"next: woq eval {target} --reference {source} --text <a text file>", highlight=False
    )


def print_conversion(done: Conversion, before: int, after: int) -> None:
    """What was converted, and what was checked."""
    rows = [
        ("read as", done.read_as),
        ("written as", done.written_as),
        ("layers", str(done.layers)),
        ("size of weights", f"{human(before)} -> {human(after)}"),
        ("read back and compared", f"{len(done.checked)} layers, the same bit for bit"),
    ]
    print_facts(f"{done.target} is ready", rows)


def _chosen(choice: Choice) -> str:
    counts = sorted(Counter(choice.widths.values()).items())
    units = ", ".join(f"{count} units of {bits} bits" for bits, count in counts)
    return f"{choice.average:.3f} on average, {choice.asked:g} allowed: {units}"


def print_folder(facts: Facts) -> None:
    """What a folder holds."""
    rows = [
        ("architecture", f"{facts.architecture}, {facts.parameters / 1e6:.2f} M parameters"),
        ("size of weights", human(facts.bytes)),
    ]
    if facts.quant_method is None:
        rows.append(("quantization", "none: a float checkpoint"))
    else:
        made = f" (made by woq: {facts.algorithm})" if facts.algorithm else ""
        rows += [
            ("format", f"{facts.format}, quant_method {facts.quant_method}{made}"),
            ("checkpoint_format", f"{facts.checkpoint_format}: {facts.layout}"),
            ("bits per weight", f"{facts.bits_per_weight:.2f} in quantized layers, scales included"),
        ]
    rows += [(f"float: {name}", told) for name, told in facts.floats.items()]
    rows += [("unusual", oddity) for oddity in facts.oddities or ["nothing"]]
    print_facts(facts.folder, rows)
    if facts.kinds:
        columns = ("layers", "bits", "group", "", "scales", "g_idx", "size", "backend")
        kinds = [
            (
                str(kind.layers), short_type(kind.bits, kind.data_type), str(kind.group), "sym" if kind.sym else "asym", kind.scales,
                "used" if kind.desc_act else "trivial", human(kind.bytes), kind.backend,
            )
            for kind in facts.kinds
        ]  # fmt: skip
        print_table(f"on {facts.runs_on}", columns, kinds)
        print_reasons((_weights(kind), kind.refused) for kind in facts.kinds)


def _weights(kind: Kind) -> str:
    bit = " bit" if kind.data_type == "int" else ""
    return f"{short_type(kind.bits, kind.data_type)}{bit}, group {kind.group}"


def print_reasons(refusals: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Why backends made for the device were passed over: each reason once, with what it was said of."""
    said: dict[tuple[str, str], list[str]] = {}
    for what, reasons in refusals:
        for told in reasons.items():
            said.setdefault(told, []).append(what)
    if said:
        columns = ("backend", "reason", "of")
        rows = [(name, why, ", ".join(dict.fromkeys(of))) for (name, why), of in said.items()]
        print_table("why not a faster backend", columns, rows)


def print_diagnosis(found: Diagnosis) -> None:
    """What this machine can run."""
    print_facts("versions", found.versions.items())
    print_facts(
        "machine", [*found.machine.items(), *found.devices.items(), ("quantizes on", found.quantizes_on)]
    )
    for device in dict.fromkeys(choice.device for choice in found.choices):
        here = [choice for choice in found.choices if choice.device == device]
        dtypes = tuple(dict.fromkeys(choice.dtype for choice in here))
        backends = {(choice.layer, choice.dtype): choice.backend for choice in here}
        layers = dict.fromkeys(choice.layer for choice in here)
        rows = [(layer, *(backends[layer, dtype] for dtype in dtypes)) for layer in layers]
        print_table(f"backends on {device}, by dtype of the activations", ("layer", *dtypes), rows)
        print_reasons((f"{choice.layer} ({choice.dtype})", choice.refused) for choice in here)


def print_selftest(lines: Sequence[Summary], failures: Sequence[Row]) -> None:
    """What ran and how far it was off; the first failures in full."""
    columns = ("backend", "device", "dtype", "bits", "wrong", "error (allowed)", "ms")
    rows = [
        (
            line.backend, line.device, line.dtype, short_type(line.bits, line.data_type), f"{line.failed} of {line.cases}",
            f"{line.worst_error:.1e} ({line.tolerance:.0e})", f"{line.milliseconds:.2f}",
        )
        for line in lines
    ]  # fmt: skip
    print_table("every kernel against float64", columns, rows)
    for row in failures[:10]:
        print_note("wrong", str(row))
    verdict = f"{len(failures)} products are wrong" if failures else "every product is right"
    note = f"{verdict}; to post: the output of `woq doctor --selftest --json`"
    Console(soft_wrap=True).print(note, highlight=False)
