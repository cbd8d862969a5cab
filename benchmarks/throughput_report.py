"""What throughput.py measured: its tables, in Markdown, and its picture."""

from pathlib import Path
from typing import Any

FORMULA = (
    "FLOPs are those of the matrix products, 2 per multiply-add, for the tokens that the masks actually kept: a block "
    "of width D and MLP width F takes n (8 D^2 + 4 D F) + 4 n^2 D on n tokens, its backward twice that; work that no "
    "loss reads is not counted for any contender (jepa/train/budget.py). The shares compare FLOP/s with a large matrix "
    "product in the same dtype, measured in the same run, and with the data sheet."
)


def report(result: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    driver = f", driver {result['driver']}" if result["driver"] else ""
    lines = [f"{result['hardware']}{driver}; {versions}; commit {result['commit']}"]
    lines += [f"`{result['command']}`, {result['ranks']} rank(s), {result['batch']} images per micro-batch and rank"]
    for mode in ("model", "train"):
        if mode not in result:
            continue
        part = result[mode]
        pairs = part.get("times_longer", {})
        head = ["", "images/s", "p50 ms", "mean", "p95", "of matmul", "of data sheet", "peak MB"]
        head += ["step time / engine's, paired", "recompiled"] if mode == "model" else ["data wait ms", "recompiled"]
        lines += ["", f"**{mode}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in part["rows"]:
            if "failed" in row:
                lines.append(f"| {row['contender']} | {row['failed']} " + "| " * (len(head) - 2) + "|")
                continue
            shares = ["" if row[k] is None else f"{row[k]:.1%}" for k in ("of_measured", "of_datasheet")]
            cells = [f"{row['images_per_second']:.2f}", *(f"{row[k]:.1f}" for k in ("p50_ms", "mean_ms", "p95_ms"))]
            cells += [
                *shares,
                f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "",
                f"{pairs.get(row['contender'], 1):.3f}" if mode == "model" else f"{row['data_wait_ms']:.2f}",
                str(row["recompiled"]),
            ]
            lines.append("| " + " | ".join([row["contender"], *cells]) + " |")
    if "model" in result:
        part = result["model"]
        row, waits = part["rows"][0], part["host_waits"]
        lines += [
            "",
            f"matrix product {part['matmul_flops'] / 1e9:.1f} GFLOP/s in {part['dtype']}: at most "
            f"{part['limit_images_per_second']:.2f} images/s at {row['gflop_per_image']:.2f} GFLOP per image"
            + f" ({row['context_tokens']:.1f} context tokens, {row['target_tokens']:.1f} per target)."
            * part["masked"],
            FORMULA,
            "Images/s is that of the median step. Steps in which a graph was compiled are counted as recompiled, and "
            "enter no other figure.",
            "Each contender was timed in turns with the engine; the engine's row is from its turns with the first one: "
            "compare contenders by the paired ratios.",
            "",
            "largest relative difference of 3 steps' losses from the engine's in fp32: "
            + ", ".join(f"{name} {error:.1e}" for name, error in part["loss_errors"].items()),
            "",
            f"recompiled steps of the engine after the warm-up: {part['recompilations']}; host waits per step: "
            + ("not applicable on a CPU" if waits is None else _waits(**waits)),
            "",
            *(f"mask sampler: {ms:.3f} ms per batch" for ms in part["parts_ms"].values()),
        ]
        for other in part["rows"]:
            lines += [f"{other['contender']}: {name} {ms:.2f} ms" for name, ms in other.get("parts_ms", {}).items()]
        if part["times_longer"]:
            lines += ["", "| contender | step time (median over pairs) | what |", "|---|---|---|"]
            for name, times in part["times_longer"].items():
                what = part["levers"].get(name.partition(" ")[2], "")
                lines.append(f"| {name} | {times:.3f} x the engine's | {what} |")
    if "data" in result:
        lines += ["", f"loader alone: {result['data']['images_per_second']:.0f} images/s per rank"]
        if "model" in result:
            model, data = result["model"]["rows"][0]["images_per_second"], result["data"]["images_per_second"]
            limit = "the model" if data >= model else "the data"
            lines.append(f"the model consumes {model:.1f}: limited by {limit} ({data / model:.2f} x)")
    return "\n".join(lines)


def _waits(calls: dict[str, float], places: dict[str, float]) -> str:
    named = [", ".join(f"{name} {count:.1f}" for name, count in found.items()) for found in (calls, places)]
    where = f" ({named[0]}; in {named[1] or 'no place that torch reports'})" if calls else ""
    return f"{sum(calls.values()):.1f}{where}"


def picture(part: dict[str, Any], title: str, file: Path) -> None:
    """FLOP/s of engine and references against the measured limit, and the effect of each lever.

    All are scaled from the engine's row by the paired ratios: a machine may be faster in one contender's turns than in
    another's.
    """
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    base = part["rows"][0]
    longer = {"engine": 1.0} | {k: x for k, x in part["times_longer"].items() if not k.startswith("with")}
    names = [*longer][::-1]
    bars = left.barh(names, [base["flops"] / longer[name] / 1e12 for name in names], color="tab:blue")
    labels = [f"{base['images_per_second'] / longer[name]:.3g} images/s" for name in names]
    left.bar_label(bars, labels, label_type="center", color="white")
    left.axvline(part["matmul_flops"] / 1e12, color="black", linestyle="--", label="large matrix product, measured")
    if part["datasheet_flops"]:
        left.axvline(part["datasheet_flops"] / 1e12, color="black", label="data sheet")
    left.set(xlabel="useful TFLOP/s, by paired ratios", title=title, ylim=(-0.6, len(names) + 0.2))
    left.legend(loc="upper left", fontsize=8)
    names = [name for name in part["times_longer"] if name.startswith("with")][::-1]
    worth = [100 * (part["times_longer"][name] - 1) for name in names]
    bars = right.barh(names, worth, color=["tab:orange" if x < 0 else "tab:blue" for x in worth])
    right.bar_label(bars, [f"{x:+.1f} %" for x in worth], padding=3)
    right.axvline(0, color="black", linewidth=0.8)
    right.margins(x=0.3)
    right.set(xlabel="change of step time, %", title="effect of each lever")
    figure.savefig(file, dpi=130)
    plt.close(figure)
