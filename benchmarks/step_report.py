"""The modelled step (`step_model.py`) as tables, a picture and JSON. `scaling.py` prints and writes them."""

from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import step_model
from machine import ROOT
from passes import COUNTED, LEAST, Passes
from step_model import GPUS, LEVERS, Step, Wire, step, unsplit_seconds

from jepa.config.file import load_config
from jepa.config.schema import Config

MODELS = {
    "ViT-H/14": "in1k_vith14_ep300_ijepa",
    "ViT-B/16": "in1k_vitb16_ep600_ijepa",
    "ViT-g/16": "in22k_vitg16_ep44_ijepa",
}
RANKS = (1, 8, 16)
SHOWN = 5e-5  # seconds: a lever worth less in a row is left out
UNITS = {"FLOP": (1e12, "TFLOP"), "byte": (1e9, "GB")}
HEADING = "MODEL, not a measurement: GPU time of one training step, of one micro-batch, by category"


def configs() -> dict[str, Config]:
    folder = ROOT / "engine/configs"
    return {
        name: load_config(folder / f"{file}.yaml", ["engine.global_batch_size=null"]) for name, file in MODELS.items()
    }


def values(kind: str, of: dict[str, Passes] = COUNTED) -> str:
    return f"{of[kind].width} D + {of[kind].hidden} F"


def assumptions() -> list[str]:
    m = step_model
    lines = []
    for gpu in GPUS:
        hopper = "none" if gpu.hopper is None else "{:.0%} and {:.0%}".format(*gpu.hopper)
        lines.append(
            f"{gpu.name}: {gpu.peak / 1e12:g} TFLOP/s dense bf16, {gpu.memory / 1e9:g} GB/s, {gpu.sms} SMs, NVLink "
            f"{gpu.nvlink / 1e9:g} and InfiniBand {gpu.adapter / 1e9:g} GB/s each way (data sheet). Shares of the "
            f"peak: products whose tiles fill all SMs {gpu.products:.0%}; FlashAttention-2 on padded work, forward and "
            f"backward, {gpu.attention[0]:.0%} and {gpu.attention[1]:.0%}; kernels written for Hopper: {hopper}. "
            f"Products in FP8: {f'{gpu.fp8:g} x the rate' if gpu.fp8 else 'none'}."
        )
    tiles = ", ".join(
        f"{a} x {b}" + ("" if rate == 1 else f" at {rate:g} of the rate") for (a, b), rate in m.TILES.items()
    )
    lines += [
        f"Products: the fastest of tiles {tiles}, and of sums split into {', '.join(map(str, m.SPLITS))} parts, which "
        f"are written and read in fp32; a tile costs {m.EDGE} more terms than it sums; the last wave takes as long as "
        "a full one; no product is faster than moving its matrices once.",
        "Attention: head dims 24 as 32, 80 and 88 as 96; lengths in tiles of queries x keys 128 x 128 (heads of up to "
        f"64) or 128 x 64 forward, 128 x 128 or 64 x 128 backward, at the lengths of {m.MASKS} sampled micro-batches.",
        f"Passes: what Inductor's kernels read and write, counted by `passes.py`: {values('forward')} values per row "
        f"and block forward, {values('backward')} backward (at best {values('forward', LEAST)} and "
        f"{values('backward', LEAST)}); D: width of the block, F: of its MLP.",
        f"Memory: {m.MEMORY_SHARE:.0%} of the data sheet's bandwidth; nothing is found in a cache.",
        "AdamW and average: 28 bytes per parameter, and 10 per parameter of the encoder; gradients to the optimizer: "
        f"{m.ALONE} on one rank, {m.BUCKET} + {m.SHARD} / ranks on several.",
        f"Links: {m.LINK_SHARE:.0%} of their rate, no overlap, one adapter per GPU; bytes as `scaling.py` counts them.",
        f"Host: {1e6 * m.LAUNCH:.0f} us per launch, as on a slow, shared host without a GPU: fast ones need less. "
        "Launches: within 10 % of those counted on the null GPU, 2,202 (H/14), 898 (B/16) and 2,548 (g/16).",
        "Not modelled: clocks under load, decoding on the GPU, logging, idle time between kernels.",
    ]
    return lines


def saved(config: Config, base: Step, wire: Wire) -> dict[str, dict[str, float]]:
    """Seconds that each lever saves in each row."""
    found = {}
    for lever in LEVERS:
        changed = {row.name: row.seconds for row in step(config, base.gpu, wire, base.ranks, [lever]).rows}
        found[lever] = {row.name: row.seconds - changed[row.name] for row in base.rows}
    return found


def model_table(name: str, config: Config, wire: Wire) -> str:
    """The rows on one GPU of each kind, beside what the levers would save in them."""
    steps = [step(config, gpu, wire) for gpu in GPUS]
    levers = [saved(config, base, wire) for base in steps]
    titles = " | ".join(f"{gpu.name}, ms | %" for gpu in GPUS)
    lines = [
        f"### {name}, {config.data.batch_size} images",
        "",
        f"| | work | {titles} | lever: ms saved on the {GPUS[0].name.split()[0]} / {GPUS[1].name.split()[0]} |",
        "|---" * (3 + 2 * len(GPUS)) + "|",
    ]
    for i, row in enumerate(steps[0].rows):
        unit, word = UNITS[row.unit]
        work = f"{row.work / unit:.3g} {word}"
        if row.useful and row.useful < row.work:
            work += f", {row.useful / row.work:.0%} useful"
        times = [f"{1e3 * s.rows[i].seconds:.1f} | {s.rows[i].seconds / s.seconds:.1%}" for s in steps]
        worth = {lever: [by[lever][row.name] for by in levers] for lever in LEVERS}
        cells = [
            f"{lever}: " + " / ".join(f"{1e3 * x:.1f}" if x >= SHOWN else "-" for x in both)
            for lever, both in worth.items()
            if max(both) >= SHOWN
        ]
        lines.append(f"| {row.name} | {work} | {' | '.join(times)} | {'; '.join(cells)} |")
    totals = [f"**{1e3 * s.seconds:.0f}** | 100 %" for s in steps]
    every = [1e3 * step(config, gpu, wire, on=LEVERS).seconds for gpu in GPUS]
    exact = [1e3 * step(config, gpu, wire, on=LEVERS.keys() - {"fp8"}).seconds for gpu in GPUS]
    lines.append(
        f"| **step** | | {' | '.join(totals)} | all levers: a step of {' / '.join(f'{x:.0f}' for x in every)} ms; "
        f"without fp8 {' / '.join(f'{x:.0f}' for x in exact)} |"
    )
    lines.append("")
    for s in steps:
        host, gpu = 1e3 * s.host_seconds, 1e3 * s.seconds
        bound = (
            f"the step is host-bound, CUDA graphs save {host - gpu:.0f} ms"
            if host > gpu
            else f"{host / gpu:.0%} of the step"
        )
        lines.append(
            f"- {s.gpu.name}: {s.images_per_second:.0f} images/s, MFU {s.mfu:.1%} (the limit at 100 %: {s.limit:.0f} "
            f"images/s). Host: {s.launches:,} launches, {host:.0f} ms: {bound}. If the predictor's products are not "
            f"split: {1e3 * unsplit_seconds(config, s.gpu):.1f} ms more."
        )
    return "\n".join(lines)


def ranks_table(every: dict[str, Config], wire: Wire) -> str:
    """Steps on several GPUs: what is sharded, copied and sent."""
    lines = [
        "### On several GPUs (ZeRO as in the config)",
        "",
        "| model | GPU | GPUs | AdamW and average, ms | gradients, ms | links, ms | step, ms | images/s per GPU | MFU "
        "| reduce_scatter, ms saved | overlap, ms saved |",
        "|---" * 11 + "|",
    ]
    for name, config in every.items():
        for gpu in GPUS:
            for ranks in RANKS:
                s = step(config, gpu, wire, ranks)
                by_name = {row.name: 1e3 * row.seconds for row in s.rows}
                names = ("AdamW and average", "gradients to the optimizer", "links")
                cells = [f"{by_name.get(row, 0):.1f}" for row in names]
                cells += [f"{1e3 * s.seconds:.1f}", f"{s.images_per_second:.0f}", f"{s.mfu:.1%}"]
                for lever in ("reduce_scatter", "overlap"):
                    cells.append(f"{1e3 * (s.seconds - step(config, gpu, wire, ranks, [lever]).seconds):.1f}")
                lines.append(f"| {name} | {gpu.name} | {ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(wire: Wire) -> str:
    every = configs()
    levers = [f"- *{name}*: {text}" for name, text in LEVERS.items()]
    return "\n\n".join(
        [
            f"**{HEADING}.** Shares are of the step on that GPU. Levers are priced one at a time: what two of them "
            "save together is less than their sum.",
            *(model_table(name, config, wire) for name, config in every.items()),
            ranks_table(every, wire),
            "### Assumptions\n\n" + "\n".join(f"- {line}" for line in assumptions()),
            "### Levers\n\n" + "\n".join(levers),
        ]
    )


def figures(wire: Wire) -> list[dict[str, Any]]:
    """The steps and what each lever saves, for JSON."""
    found = []
    for (name, config), gpu, ranks in product(configs().items(), GPUS, RANKS):
        s = step(config, gpu, wire, ranks)
        result: dict[str, Any] = {"model": name, "gpu": gpu.name, "ranks": ranks, "images": config.data.batch_size}
        result |= {"seconds": s.seconds, "images_per_second": s.images_per_second, "mfu": s.mfu}
        result |= {"host_seconds": s.host_seconds, "rows": [asdict(row) for row in s.rows]}
        result["saved"] = {lever: sum(rows.values()) for lever, rows in saved(config, s, wire).items()}
        found.append(result)
    return found


GROUPS = {  # the first words of the rows: label and colour
    "products": ("matrix products", "tab:blue"),
    "attention": ("attention", "tab:orange"),
    "passes": ("passes between products", "tab:green"),
    "our ops": ("our ops, norms", "tab:gray"),
    "AdamW": ("AdamW and average", "tab:red"),
    "gradients": ("gradients to it", "tab:pink"),
    "links": ("links", "tab:purple"),
}


def picture(wire: Wire, file: Path) -> None:
    """One bar per model and GPU, on one and on eight GPUs: the share of the step that each category takes."""
    from matplotlib import pyplot as plt

    bars = [step(config, gpu, wire, ranks) for config in configs().values() for gpu in GPUS for ranks in (1, 8)]
    names = [f"{name}, {gpu.name.split()[0]} x {ranks}" for name in MODELS for gpu in GPUS for ranks in (1, 8)]
    figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
    left = [0.0] * len(bars)
    for group, (label, colour) in GROUPS.items():
        parts = [sum(row.seconds for row in s.rows if row.name.startswith(group)) for s in bars]
        shares = [100 * part / s.seconds for part, s in zip(parts, bars, strict=True)]
        drawn = axes.barh(names, shares, left=left, color=colour, label=label, edgecolor="white", linewidth=0.5)
        texts = [f"{1e3 * p:.3g}" if share > 3.5 else "" for p, share in zip(parts, shares, strict=True)]
        axes.bar_label(drawn, texts, label_type="center", color="white", fontsize=8)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for place, s in enumerate(bars):
        axes.text(101, place, f"{1e3 * s.seconds:.0f} ms, MFU {s.mfu:.0%}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the step, % (numbers in the bars: ms)")
    axes.set_title("MODEL, not a measurement: where a training step's GPU time goes", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(GROUPS), loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)
