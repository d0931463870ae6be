"""Makes the README's tables and plots from the committed rows: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rows import RESULTS

ROOT = Path(__file__).parent.parent
NAMES = {
    "flash": "ours (default tiling)",
    "blocked": "ours (Blocked)",
    "relaxed": "ours (Relaxed, the paper's tiling)",
    "epoched": "epoched (FutureFill)",
    "lazy": "lazy",
    "eager": "eager",
    "full": "full recompute",
    "unmixed": "no mixing at all",
}
COLOURS = {
    "flash": "#d1495b",
    "epoched": "#66a182",
    "lazy": "#2e4057",
    "eager": "#8d96a3",
    "full": "#edae49",
    "unmixed": "#bbbbbb",
}


def read(name: str) -> list[dict[str, object]]:
    """The rows of one question; none if it was not run yet."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def length_table(rows: list[dict[str, object]]) -> str:
    """Microseconds a token, and the ratio to lazy, by length."""
    runs = [row for row in rows if "length" in row]
    lengths = sorted({row["length"] for row in runs})
    found = {(row["decoder"], row["length"]): row for row in runs}
    head = "| us per token | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |"
    lines = [head, "|---|" + "---:|" * len(lengths)]
    for name, label in NAMES.items():
        cells = [f"{found[name, n]['us_per_token']:,.0f}" if (name, n) in found else "" for n in lengths]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for label, key in (("lazy / ours, whole decode", "us_per_token"), ("lazy / ours, mixing alone", "mixing_us")):
        cells = [f"**{found['lazy', n][key] / found['flash', n][key]:.1f}x**" for n in lengths]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    cells = [
        f"{found['flash', n]['worst_us']:,.0f} ({found['flash', n]['worst_over_median']}x median)" for n in lengths
    ]
    lines.append("| ours, worst token | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(rows, "cpu_length")])


def online_table(rows: list[dict[str, object]]) -> str:
    """Microseconds a sample of OnlineConvolution and its baselines."""
    lines = [
        "| one sample a push, 48,000 taps | channels | mean us | median | p99.9 | worst |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "channels" in row:
            numbers = " | ".join(f"{row[k]:,.1f}" for k in ("us_per_token", "median_us", "p999_us", "worst_us"))
            label = {"flash": "`OnlineConvolution`", "direct": "direct dot product"}.get(
                str(row["method"]), row["method"]
            )
            lines.append(f"| {label} | {row['channels']} | {numbers} |")
    return "\n".join([*lines, "", source(rows, "cpu_online")])


def prompt_table(rows: list[dict[str, object]]) -> str:
    """Time to the first token beside one full forward."""
    lines = ["| prompt | first token | one full forward | ratio | prefill tokens/s |", "|---:|---:|---:|---:|---:|"]
    for row in rows:
        seconds = f"{row['first_token_s']:.3f} s | {row['full_forward_s']:.3f} s"
        lines.append(f"| {row['prompt']:,} | {seconds} | {row['ratio']:.2f} | {row['prefill_tokens_per_s']:,} |")
    return "\n".join([*lines, "", source(rows, "cpu_prompt")])


def source(rows: list[dict[str, object]], name: str) -> str:
    """Where the numbers come from."""
    row = rows[-1]
    return (
        f"Measured at commit {row['commit']} on {row['date']}: {row['device']}, {row['cores']} threads, "
        f"torch {row['torch']}, numpy {row['numpy']}. Rows: `benchmarks/results/{name}.jsonl`, "
        f"made by `flash-inference bench {name}`."
    )


def length_plot(rows: list[dict[str, object]], path: Path) -> None:
    """Microseconds a token against length, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flash_inference"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, colour in COLOURS.items():
        points = sorted((row["length"], row["us_per_token"]) for row in rows if row["decoder"] == name)
        if points:
            style = (
                {"linewidth": 2.6}
                if name == "flash"
                else {"linewidth": 1.5, "linestyle": "--" if name == "unmixed" else "-"}
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=NAMES[name], **style)
    axes.set(xscale="log", yscale="log", xlabel="generated tokens", ylabel="mean microseconds per token")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.25)
    axes.set_title("Order-2 Hyena, D = 256, 4 layers, batch 1, float32, two CPU cores", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)
    plt.close(figure)


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    return pattern.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text)


def main(argv: list[str] | None = None) -> None:
    """Rewrites the README's marked sections and the plot."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, make in (("cpu_length", length_table), ("cpu_online", online_table), ("cpu_prompt", prompt_table)):
        if rows := read(name):
            text = fill(text, name, make(rows))
    readme.write_text(text)
    if rows := read("cpu_length"):
        length_plot(rows, ROOT / "docs/images/cpu_length.svg")


if __name__ == "__main__":
    main()
