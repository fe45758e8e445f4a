"""Writes a GPU report: Markdown for people, JSON for programs, and a plot if matplotlib is installed."""

import json
import pathlib

BASELINE = "torch SGD fused"
EXPLANATION = """
Times are medians in microseconds. "cold": the device's time for a step with other data in L2, as after a
backward pass; "warm": after another step; "graph": of replays in a row of the step as a CUDA graph; "host":
until the step is queued. The optimizers took turns. GB/s are those of the bytes that a step must move, in the
cold time; "of a copy" is their share of what a large device-to-device copy in the same rounds moved, reads
and writes counted. "launches" are kernels, copies and memsets. "-" was not measured: a step that refuses
capture has no graph, and a profiler that sees nothing of the GPU counts no launches. "*": the GPU was idle
within the cold time, since it was faster than the host; the time is the host's then.
"""
COLUMNS = ("launches", "cold", "warm", "graph", "host", "GB/s", "of a copy", f"x {BASELINE}")


def table(header, rows) -> list[str]:
    cells = (
        [str(cell).replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)
    )
    return [f"| {' | '.join(row)} |" for row in cells]


def number(value, factor=1.0, digits=1, unit="") -> str:
    return "-" if value is None else f"{factor * value:,.{digits}f}{unit}"


def fact(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    return "not known" if value is None else str(value).replace("\n", "; ")


def figure_rows(result):
    """Yields a row for each optimizer of a step.py result, fastest first: the name, then COLUMNS."""
    cold = {step["optimizer"]: step["ms"] for step in result["steps"]}
    for step in result["steps"]:
        times = [number(step.get(kind), 1e3) for kind in ("ms", "warm_ms", "graph_ms", "host_ms")]
        times[0] += "*" if step["idle"] else ""
        ratio = step["ms"] / cold[BASELINE] if BASELINE in cold else None
        rates = [number(step["gb_per_s"], digits=0), number(step["per_cent_of_copy"], digits=0, unit=" %")]
        yield [step["optimizer"], number(step["launches"], digits=0), *times, *rates, number(ratio, digits=2)]


def markdown(report) -> str:
    """Returns the report for readers: what was run, what was not and why, the machine, the figures."""
    lines = [f"# fused_lars on {report['machine']['GPU']}", ""]
    lines += table(("part", "result", ""), [line.values() for line in report["parts"]])
    lines += ["", "## Figures", *EXPLANATION.splitlines()]
    for result in report["results"]:
        copy = f"A copy moved {result['copy_gb_per_s']:,.0f} GB/s; {result['rounds']} rounds."
        lines += ["", f"### {result['workload']}, {result['types']}", ""]
        lines += [f"{result['tensors']} tensors, {result['parameters']:,} parameters. {copy}", ""]
        lines += table(("optimizer", *COLUMNS), figure_rows(result))
    lines += ["", "## Machine", ""]
    lines += table(("", ""), [(name, fact(value)) for name, value in report["machine"].items()])
    return "\n".join(lines) + "\n"


def write(report, folder: pathlib.Path) -> None:
    """Writes report.md, report.json and report.png to a folder. Without a plot, the table says why."""
    parts = report["parts"]
    try:
        from step import plot

        if report["results"]:
            plot({**report, "device": report["machine"]["GPU"]}, folder / "report.png")
    except ImportError as error:
        parts = [*parts, {"part": "plot", "result": "not run", "text": str(error)}]
    (folder / "report.md").write_text(markdown({**report, "parts": parts}))
    (folder / "report.json").write_text(json.dumps({**report, "parts": parts}, indent=1) + "\n")
