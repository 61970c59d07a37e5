"""A CSV of benchmarks/bench_linear_cpu.py as tables in Markdown, and as a plot beside it.

python -m benchmarks.cpu_tables benchmarks/results/linear_cpu_avx2.csv --plot
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, str]
Key = tuple[str, str, str]  # threads, K, N
OWN = "woq "


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def label(row: Row) -> str:
    """The backend; for our rows of other weights also which."""
    weight = f"{row['bits']} bit{'' if row['sym'] == 'True' else ' asym'}"
    plain = not row["backend"].startswith((OWN, "torch")) or weight == "4 bit"
    return row["backend"] if plain else f"{row['backend']}, {weight}"


def tables(rows: list[Row]) -> str:
    """A table for each number of threads and shape: median microseconds per call, our rows first, then by the first column."""
    said = []
    for (threads, k, n), of_one in grouped(rows).items():
        times = cells(of_one)
        tokens = sorted({int(m) for by_tokens in times.values() for m in by_tokens})
        order = sorted(times, key=lambda name: (not name[0].startswith(OWN), times[name].get(tokens[0], 1e9)))
        threads_said = f"{threads} thread{'s' if threads != '1' else ''}"
        head = f"| {k} -> {n}, {threads_said} | activations | " + " | ".join(f"M={m}" for m in tokens) + " |"
        said += [head, "|---" * (len(tokens) + 2) + "|"]
        for name in order:
            values = " | ".join(number(times[name].get(m)) for m in tokens)
            said.append(f"| {name[0]} | {name[1]} | {values} |")
        said.append("")
    return "\n".join([*said, *provenance(rows)])


def grouped(rows: list[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        if row["metric"] == "time":
            found.setdefault((row["threads"], row["K"], row["N"]), []).append(row)
    return found


def cells(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, float]]:
    """(name, activations) -> M -> microseconds; dense rows of other widths than the first measure nothing new."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        times.setdefault((label(row), row["activations"]), {}).setdefault(int(row["M"]), float(row["p50"]))
    return times


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value < 1e4 else f"{round(value, -2):.0f}"


def provenance(rows: list[Row]) -> list[str]:
    """Where the figures come from, in one sentence a machine."""
    machines = dict.fromkeys((r["cpu"], r["isa"], r["torch"], r["commit"], r["date"]) for r in rows)
    versions = dict.fromkeys(
        f"{r['package']} {r['version']}" for r in rows if r["package"] not in ("woq", "torch")
    )
    return [
        f"{cpu} ({isa}); torch {torch}; commit {commit}, {date}; {'; '.join(versions)}."
        for cpu, isa, torch, commit, date in machines
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Time over tokens, one panel a shape and number of threads, symmetric 4 bits."""
    from matplotlib import pyplot

    wanted = [r for r in rows if ", " not in label(r)]
    groups = grouped(wanted)
    figure, panels = pyplot.subplots(1, len(groups), figsize=(4.5 * len(groups), 4.5), squeeze=False)
    for axes, ((threads, k, n), of_one) in zip(panels[0], groups.items(), strict=True):
        for (name, _), times in cells(of_one).items():
            ours = name.startswith(OWN)
            axes.plot(
                list(times),
                list(times.values()),
                marker="o",
                markersize=3,
                linewidth=2.2 if ours else 1,
                label=name,
            )
        axes.set(
            xscale="log", yscale="log", xlabel="tokens", ylabel="us", title=f"{k} -> {n}, threads: {threads}"
        )
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--plot", action="store_true", help="draw it beside the CSV")
    args = parser.parse_args()
    rows = read(args.csv)
    print(tables(rows))
    if args.plot:
        plot(rows, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
