"""What a run is and needs, before it starts: `train.py --dry-run` prints this."""

from dataclasses import asdict
from json import dumps

from jepa.config.file import to_yaml
from jepa.config.schema import Config, Size
from jepa.model.cost import hidden

from .budget import flops_per_image, longest_tokens, mean_tokens, parameters
from .memory import memory_per_rank
from .zero import deepspeed_config


def report(config: Config, world_size: int) -> str:
    """The whole YAML, what its nulls resolve to, DeepSpeed's JSON, parameters, FLOPs and memory. Raises ConfigError."""
    batch = config.batch(world_size)
    mean, longest = mean_tokens(config), longest_tokens(config)
    counts, flops = parameters(config), flops_per_image(config, mean)
    masked = config.method.masked
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    return "\n\n".join(
        [
            to_yaml(config).rstrip(),
            "DeepSpeed: " + dumps(deepspeed_config(config, world_size, counts.total), indent=2),
            f"encoder {_size(config.vit)}; "
            + (f"predictor {_size(config.predictor)}; mask.cut {config.cut}; " if masked else "")
            + f"{config.precision}; blocks compiled on a GPU: {'yes' if config.compiles('cuda') else 'no'}",
            f"{batch.micro_batch} images x {batch.accumulation} accumulated x {ranks} = {batch.global_batch} per step\n"
            f"{config.grid**2} patches per image"
            + (
                f"; on average {mean.context:.1f} in a context, {mean.target:.1f} in a target, {mean.rows:.1f} target "
                "encoder outputs needed"
                if masked
                else ""
            ),
            _table("parameters (million)", 1e6, {**counts.parts, "total": counts.total}),
            _table("GFLOP per image", 1e9, flops | {"total": sum(flops.values())}),
            _table(
                f"peak memory per rank (GiB), {ranks}, ZeRO {config.engine.zero_stage}, {config.precision}"
                + (f": in the mean step, and at the longest context, {longest.context:.0f} patches" if masked else ""),
                2**30,
                *(asdict(memory_per_rank(config, world_size, tokens)) for tokens in dict.fromkeys((mean, longest))),
            ),
        ]
    )


def _size(vit: Size) -> str:
    return f"width {vit.embed_dim}, depth {vit.depth}, {vit.num_heads} heads, MLP width {hidden(vit)}"


def _table(title: str, unit: float, *columns: dict[str, float]) -> str:
    rows = [f"  {name:<12}" + "".join(f"{column[name] / unit:>12.3f}" for column in columns) for name in columns[0]]
    return "\n".join([title, *rows])
