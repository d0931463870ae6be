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
    shares = [f"{found['lazy', n]['share_of_read_bandwidth']} at {n:,}" for n in lengths]
    read = f"Lazy reads at this share of the measured bandwidth, halfway through a run: {', '.join(shares)} tokens."
    return "\n".join([*lines, "", read, "", source(rows, "cpu_length")])


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
    plt = pyplot()
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
    save(figure, path)


def gpu_rows() -> tuple[dict[str, dict[str, object]], list[dict[str, object]]]:
    """The rows of the main setting by name, those of the first row's commit and device, and all rows."""
    rows = read("gpu_decode")
    main = [row for row in rows if (row["layers"], row["width"], row["length"]) == (18, 768, 131_072)]
    same = [row for row in main if (row["commit"], row["device"]) == (rows[0]["commit"], rows[0]["device"])]
    return {str(row["name"]): row for row in reversed(same)}, rows


def card(row: dict[str, object]) -> str:
    """The GPU of a row, without its maker and memory."""
    return str(row["device"]).removeprefix("NVIDIA ").split()[0]


GPU_BASELINES = {
    "epoched": ("epoched (FutureFill), our step", "epoched", "mixing", "without_us"),
    "transformer": ("Transformer of the same size, KV cache, fused attention", "transformer", None, None),
    "lazy_fused": ("lazy, hand-fused, our step", "lazy_fused", "mixing", "without_us"),
    "eager_plain": ("eager, plain PyTorch in a graph", "eager_plain", "plain_step", "mean_us"),
    "lazy_plain": ("lazy, plain PyTorch in a graph", "lazy_plain", "plain_step", "mean_us"),
}


def planned(row: dict[str, object]) -> str:
    """What a run's plan said of its memory, where the row has it."""
    return f" ({row['planned_bytes'] / 1e9:.1f} planned)" if "planned_bytes" in row else ""


def gpu_table(rows: list[dict[str, object]]) -> str:
    """Microseconds a token on one GPU, ours and the baselines, and other shapes."""
    found, rows = gpu_rows()
    ours = found["bounded"]["us_per_token"]
    lines = [
        "| 18 layers, D = 768, 131,072 tokens, batch 1 | us per token | whole run | against ours |",
        "|---|---:|---:|---:|",
    ]

    def line(label: str, us: float) -> str:
        return f"| {label} | {us:,.1f} | {us * 131_072 / 1e6:,.0f} s | {us / ours:.1f}x |"

    lines.append(line("**ours** (default: no token waits for a large tile)", ours))
    lines.append(line("ours (Relaxed)", found["relaxed"]["us_per_token"]))
    for label, mixer, step, key in GPU_BASELINES.values():
        lines.append(line(label, found[mixer]["mean_us"] + (found[step][key] if step else 0.0)))
    run, mixing = found["bounded"], found["mixing"]
    low, high = mixing["interval_us"]
    lines += [
        "",
        f"Step times on the GPU's clock: median {run['median_us']:.1f}, p99.9 {run['p999_us']:.1f}, worst "
        f"{run['worst_us']:,.1f} us. The tiles of all mixers add {mixing['mixing_us']:.1f} us a token ({low:.1f} to "
        f"{high:.1f}): {found['lazy_fused']['mean_us'] / mixing['mixing_us']:,.0f}x less than the hand-fused lazy "
        f"mixer, "
        f"{found['lazy_plain']['mean_us'] / mixing['mixing_us']:,.0f}x less than the plain one. Streaming the weights "
        f"alone takes {run['weight_floor_us']:.0f} us. Against a float64 forward over all {run['length']:,} tokens: "
        f"{run['differences']} tokens differ, the worst layer's relative error is "
        f"{run['worst_layer_relative_error']:.1e}.",
        "",
        "| other runs | GPU | commit | us per token | whole run | worst step | peak memory | worst layer's error |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["name"] == "bounded" and row is not rows[0]:
            lines.append(
                f"| {row['layers']} layers, D = {row['width']}, {row['length']:,} tokens | {card(row)} | "
                f"{row['commit']} | "
                f"{row['us_per_token']:.1f} | {row['seconds']:.0f} s | {row['worst_us'] / 1e3:,.2f} ms | "
                f"{row['peak_bytes'] / 1e9:.1f} GB{planned(row)} | {row['worst_layer_relative_error']:.1e} |"
            )
    return "\n".join(
        [
            *lines,
            "",
            f"Measured on {run['date']}: {run['device']}, torch {run['torch']}, commit {run['commit']}. Rows: "
            "`benchmarks/results/gpu_decode.jsonl`, made by `flash-inference bench gpu_decode`.",
        ]
    )


def gpu_plot(path: Path) -> None:
    """Microseconds of the token at a position, both logarithmic."""
    plt = pyplot()
    found, _ = gpu_rows()
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    colours = {"lazy_fused": "#2e4057", "lazy_plain": "#5b8e9f", "eager_plain": "#8d96a3", "transformer": "#edae49"}
    for name, colour in colours.items():
        label, mixer, step, key = GPU_BASELINES[name]
        extra = found[step][key] if step else 0.0
        times = [t + extra for t in found[mixer]["times_us"]]
        axes.plot(found[mixer]["positions"], times, marker="o", markersize=3, color=colour, label=label)
    run = found["bounded"]
    axes.axhline(run["us_per_token"], color="#d1495b", linewidth=2.6, label="ours, mean of the whole run")
    axes.axhline(run["weight_floor_us"], color="#bbbbbb", linestyle="--", label="streaming the weights alone")
    axes.set(yscale="log", xlabel="position", ylabel="microseconds for its token", xlim=(800, 140_000))
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.25)
    axes.set_title(f"Order-2 Hyena, D = 768, 18 layers, batch 1, one {card(run)}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def batch_table(rows: list[dict[str, object]]) -> str:
    """Tokens a second of batches on one GPU, each with its answer's error."""
    lines = [
        "| rows | tokens/s | against one row | us per step | median | worst | differing tokens | worst layer's error "
        "| GPU | commit |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    runs = [row for row in rows if row["name"] == "batch"]
    for row in runs:
        answers = [answer for name, answer in row.items() if name.startswith("row_")]
        error = max(answer["worst_layer_relative_error"] for answer in answers)
        different = sum(answer["differences"] for answer in answers)
        lines.append(
            f"| {row['batch']} | {row['tokens_per_s']:,.0f} | {row['against_one_row']:.2f}x | "
            f"{row['us_per_step']:.0f} | {row['median_us']:.0f} | {row['worst_us']:,.0f} | {different} | {error:.1e} | "
            f"{card(row)} | {row['commit']} |"
        )
    last = runs[-1]
    return "\n".join(
        [
            *lines,
            "",
            f"{last['layers']} layers, D = {last['width']}, {last['length']:,} tokens a row, first and last row held "
            f'against float64; "against one row" is against that of the same commit. Last measured on {last["date"]}, '
            f"torch {last['torch']}. Rows: `benchmarks/results/gpu_batch.jsonl`, made by "
            "`flash-inference bench gpu_batch`.",
        ]
    )


PARTS = {
    "mix": "norm, input projection, short filter, mixer's row",
    "out": "output projection",
    "fc1": "norm, first MLP matrix, GELU",
    "fc2": "second MLP matrix",
    "head": "head",
    "rest": "choice of the token, and what no kernel alone accounts for",
    "tiles": "tiles of all mixers",
}


def step_parts(row: dict[str, object], runs: dict[int, dict[str, object]]) -> dict[str, float]:
    """Microseconds of a step by what they go to: what it is faster without a kind of kernel, the rest, the tiles."""
    costs, step = row["costs_us"], row["step_us"]
    return {**costs, "rest": step - sum(costs.values()), "tiles": runs[row["batch"]]["us_per_step"] - step}


def step_plot(rows: list[dict[str, object]], path: Path) -> None:
    """Where a step's time goes, by rows of the batch."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 3.3), layout="constrained")
    colours = ["#2e4057", "#5b8e9f", "#66a182", "#8fbf9f", "#edae49", "#cccccc", "#d1495b"]
    device = rows[0]["device"]
    runs = {row["batch"]: row for row in read("gpu_batch") if row["name"] == "batch" and row["device"] == device}
    names = ["1 row" if row["batch"] == 1 else f"{row['batch']} rows" for row in rows]
    left, found = [0.0] * len(rows), [step_parts(row, runs) for row in rows]
    for (name, label), colour in zip(PARTS.items(), colours, strict=True):
        widths = [max(0.0, parts[name]) for parts in found]
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="microseconds a step")
    axes.set_title(f"Order-2 Hyena, D = 768, 18 layers, 16,384 tokens a row, one {card(rows[0])}", fontsize=10)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    save(figure, path)


def tiles_plot(rows: list[dict[str, object]], path: Path) -> None:
    """Microseconds a tile of all mixers by side, a panel a batch: each implementation, the better one, the bytes."""
    plt = pyplot()
    batches = sorted({row["batch"] for row in rows if "us" in row})
    figure, panels = plt.subplots(1, len(batches), figsize=(3.4 * len(batches), 3.4), sharey=True, layout="constrained")
    for axes, batch in zip([panels] if len(batches) == 1 else panels, batches, strict=True):
        some = [row for row in rows if row["batch"] == batch and "us" in row]
        for impl, colour in (("direct", "#2e4057"), ("toeplitz", "#edae49"), ("fft", "#66a182")):
            points = sorted((row["side"], row["us"]) for row in some if row["impl"] == impl)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=impl)
        sides = sorted({row["side"] for row in some})
        best = [min(row["us"] for row in some if row["side"] == side) for side in sides]
        least = [next(row["floor_us"] for row in some if row["side"] == side) for side in sides]
        axes.plot(sides, best, color="#d1495b", linewidth=5, alpha=0.3, label="hybrid")
        axes.plot(sides, least, color="#bbbbbb", linestyle="--", label="bytes at 3.0 TB/s")
        axes.set(yscale="log", xlabel="side of the tile")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
        axes.set_title(f"batch {batch}", fontsize=10)
    figure.supylabel("microseconds, 18 layers of width 768", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def latency_plot(rows: list[dict[str, object]], path: Path) -> None:
    """Step times by the share of steps that are slower, both logarithmic."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for row, colour in zip(rows, ("#d1495b", "#2e4057", "#66a182"), strict=False):
        label = f"{row['latency']}: worst {row['worst_over_median']:.2f} x the median"
        axes.plot(*zip(*row["quantiles"], strict=True), color=colour, marker=".", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="share of the steps that take longer", ylabel="microseconds")
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    row = rows[0]
    title = f"Order-2 Hyena, D = {row['width']}, {row['layers']} layers, {row['tokens']:,} tokens, {row['device']}"
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def memory_plot(rows: list[dict[str, object]], path: Path) -> None:
    """Bytes by purpose as planned, and the peaks that were measured."""
    plt = pyplot()
    widths = sorted({row["width"] for row in rows})
    figure, panels = plt.subplots(1, len(widths), figsize=(3.9 * len(widths), 3.6), layout="constrained")
    parts = {
        "state": "#2e4057",
        "spectra": "#66a182",
        "weights": "#edae49",
        "filters": "#8d96a3",
        "workspace": "#5b8e9f",
    }
    for axes, width in zip([panels] if len(widths) == 1 else panels, widths, strict=True):
        some = [row for row in rows if row["width"] == width and row["state_dtype"] == "torch.float32"]
        some.sort(key=lambda row: row["length"])
        names, left = [f"{row['length']:,}" for row in some], [0.0] * len(some)
        for part, colour in parts.items():
            sizes = [row[f"planned_{part}"] / 1e9 for row in some]
            axes.bar(names, sizes, bottom=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        measured = [row["peak_bytes"] / 1e9 for row in some]
        axes.plot(names, measured, "o", color="#d1495b", label="measured peak")
        axes.set(xlabel="positions", ylabel="GB")
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(f"{some[0]['layers']} layers of width {width}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def pyplot():
    """matplotlib, with plots that do not change from run to run."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flash_inference"
    import matplotlib.pyplot as plt

    return plt


def save(figure, path: Path) -> None:
    """Writes a figure without its date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)
    pyplot().close(figure)


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    return pattern.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text)


def main(argv: list[str] | None = None) -> None:
    """Rewrites the README's marked sections and the plot."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, make in (
        ("cpu_length", length_table),
        ("cpu_online", online_table),
        ("cpu_prompt", prompt_table),
        ("gpu_decode", gpu_table),
        ("gpu_batch", batch_table),
    ):
        if rows := read(name):
            text = fill(text, name, make(rows))
    readme.write_text(text)
    if rows := read("cpu_length"):
        length_plot(rows, ROOT / "docs/images/cpu_length.svg")
    if read("gpu_decode"):
        gpu_plot(ROOT / "docs/images/gpu_decode.svg")
    if rows := read("gpu_step"):
        step_plot(rows, ROOT / "docs/images/gpu_step.svg")
    plots = {"gpu_tiles": tiles_plot, "gpu_latency": latency_plot, "gpu_memory": memory_plot}
    for name, plot in plots.items():
        if rows := read(name):
            plot(rows, ROOT / f"docs/images/{name}.svg")


if __name__ == "__main__":
    main()
