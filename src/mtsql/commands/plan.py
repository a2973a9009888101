"""Say whether a recipe fits on GPUs, and how long its run takes.

    mtsql plan configs/rl_cosql_qwen3_4b.yaml --gpus 8 --gpu_memory 80
    mtsql plan configs/sft_sparc_qwen3_1.7b.yaml --gpu A100 --sft.epochs 2

Flags that are not listed here are flags of the script that the recipe is for,
and win over the recipe. No GPU is needed, and neither are the model's
weights: without its folder, --shape names a published model, or the folder's
name does.

Memory is counted part by part (docs/memory.md). Hours are arithmetic from
data sheets and from assumptions, which are printed and are flags. Nothing
here was measured on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mtsql.commands.arguments import spelled_out
from mtsql.files import print_line
from mtsql.model.shapes import SHAPES
from mtsql.plan.clock import BYTES, Clock, Lengths, Shares, gpu_named
from mtsql.plan.fit import Way, fits, memory_of, peak, proposals, ways
from mtsql.plan.hours import phases_of
from mtsql.plan.memory import MARGIN, PHASES, peak_bytes
from mtsql.plan.recipe import Recipe, read_recipe
from mtsql.run.config import flat, parse_config, to_dict
from mtsql.run.screen import wrapped

GIB = 1 << 30
HELP = ("-h", "--help")


@dataclass(frozen=True)
class Config:
    """Flags of mtsql plan."""

    gpus: int = 1
    """Number of GPUs, one process each."""
    gpu: str = "H100"
    """Kind of GPU, for its speed: A100, A100-40GB, B200, H100, H200, L40S or RTX 4090."""
    gpu_memory: float = 80.0
    """Memory of a GPU in GiB."""
    shape: str | None = None
    """A published model whose sizes are planned with, such as qwen3-4b. null: those in the folder
    `model.path` or, without it, those of the model that the folder's name contains."""
    turns: int = 0
    """Training turns, without the held-out ones. 0: those of the recipe's file if it is there, else
    the paper's."""
    dev_turns: int = 0
    """Turns of the dev split. 0: those of the recipe's file if it is there, else the official
    ones."""
    solved: tuple[float, ...] = (0.68, 0.79, 0.81)
    """Share of the turns that is solved after each round of stage 1 (paper, for CoSQL)."""
    lengths: Lengths = Lengths()
    shares: Shares = Shares()

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus is {self.gpus}: it must be at least 1")
        if self.gpu_memory <= 0:
            raise ValueError(f"gpu_memory is {self.gpu_memory}: it must be above 0")
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape}: expected one of {', '.join(SHAPES)}")
        for name in ("turns", "dev_turns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative (0 = as the recipe says)")
        if not self.solved or not all(0 <= share < 1 for share in self.solved):
            raise ValueError("solved must be shares of at least 0 and below 1")
        gpu_named(self.gpu)


def main(words: Sequence[str]) -> None:
    """Plan and print. ValueError if the run fits in no way, which says what would make it fit."""
    recipes, own, others = split_words(words)
    config = parse_config(Config, spelled_out(own, Config), __doc__)
    if others and not recipes:
        raise ValueError(f"unknown flag {others[0]}; --help lists all")
    if len(recipes) != 1:
        raise ValueError("mtsql plan takes one recipe: mtsql plan RECIPE --gpus 8")
    recipe = read_recipe(recipes[0], others, config.shape, config.turns, config.dev_turns)
    gpu_bytes = round(config.gpu_memory * GIB)
    found = [(way, memory_of(recipe, way)) for way in ways(config.gpus)]
    for line in memory_lines(recipe, found, config):
        print_line(line)
    fitting = [way for way, parts in found if fits(parts, gpu_bytes)]
    tried = proposals(recipe, config.gpus, gpu_bytes)
    if not fitting:
        fixes = "; or ".join(tried) or "a larger GPU or a smaller model"
        raise ValueError(f"{recipes[0]} does not fit on {_gpus(config)}: try {fixes}")
    for way in fitting:
        if recipe.dtype.itemsize == BYTES:
            for line in hour_lines(recipe, way, config):
                print_line(line)
    if recipe.dtype.itemsize == BYTES:
        print_line(assumptions(recipe, config))
    else:
        print_line("\nhours: known for bfloat16 only")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(recipes, flags of this command, flags of the script), each flag with its value."""
    known = {*flat(to_dict(Config()))}
    sections = {key.split(".")[0] for key in known}
    recipes: list[str] = []
    own: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            recipes.append(word)
            continue
        name = word.partition("=")[0].removeprefix("--")
        is_own = word in HELP or name in known or name.split(".")[0] in sections
        target = own if is_own else others
        target.append(word)
        if "=" not in word and word not in HELP:
            while rest and not rest[0].startswith("--"):
                target.append(rest.pop(0))
                if not is_own:
                    break
    return recipes, own, others


def memory_lines(
    recipe: Recipe, found: list[tuple[Way, dict[str, int]]], config: Config
) -> list[str]:
    """A table of parts and phases, with a column for each way."""
    lines = [
        wrapped(
            f"model: {recipe.model}; {recipe.turns} training, {recipe.held_out_turns} held-out and "
            f"{recipe.dev_turns} dev turns (of {recipe.counted})"
        ),
        _row("GB on each GPU", [way.name for way, _ in found]),
    ]
    for name in found[0][1]:
        values = [parts[name] for _, parts in found]
        if any(values):
            lines.append(_row(f"  {name.replace('_', ' ')}", [_gb(value) for value in values]))
    for phase in PHASES:
        values = [peak_bytes(parts, phase) for _, parts in found]
        has_phase = recipe.engine if phase == "rollout" else phase != "scoring" or recipe.reference
        if has_phase:
            lines.append(_row(f"in {phase}", [_gb(value) for value in values]))
    usable = config.gpu_memory * GIB * (1 - MARGIN)
    lines.append(_row("usable", [_gb(usable)] * len(found)))
    words = []
    for _, parts in found:
        phase, _ = peak(parts)
        words.append("yes" if fits(parts, round(config.gpu_memory * GIB)) else f"no ({phase})")
    return [*lines, _row("fits", words)]


def hour_lines(recipe: Recipe, way: Way, config: Config) -> list[str]:
    """The phases of the run and their hours."""
    clock = make_clock(recipe, way, config)
    phases = phases_of(recipe, clock, config.solved)
    lines = ["", f"hours on {_gpus(config)}, {way.name}"]
    if recipe.engine is not None:
        group = (
            recipe.config.group_size
            if recipe.stage == "rl"
            else (recipe.config.selftaught.samples_per_turn)
        )
        rows = clock.num_rows(group)
        lines.append(f"  {rows} rows of mean length decode together on each GPU")
    for phase in phases:
        lines.append(f"  {phase.name:<18} {phase.secs / 3600:7.1f}  {phase.what}")
    total = sum(phase.secs for phase in phases) / 3600
    return [*lines, f"  {'all':<18} {total:7.1f}  {total * config.gpus:.0f} GPU hours"]


def make_clock(recipe: Recipe, way: Way, config: Config) -> Clock:
    """The clock of a recipe that runs in this way."""
    engine = recipe.config.engine
    return Clock(
        shape=recipe.shape,
        gpu=gpu_named(config.gpu),
        lengths=lengths_of(recipe, config),
        shares=config.shares,
        num_ranks=way.num_ranks,
        is_sharded=way.is_sharded,
        is_adapted=recipe.config.model.lora.rank > 0,
        checkpointing=recipe.config.model.gradient_checkpointing,
        cache_bytes=engine.cache_bytes,
        max_rows=engine.max_rows,
        max_tokens=recipe.config.sampling.max_trajectory_tokens,
    )


def lengths_of(recipe: Recipe, config: Config) -> Lengths:
    """What is assumed of the trajectories of this recipe."""
    return config.lengths.of_episodes(recipe.config.env.max_replies, recipe.engine is None)


def assumptions(recipe: Recipe, config: Config) -> str:
    """What the hours assume, as flags."""
    values = {
        **flat(to_dict(lengths_of(recipe, config)), "lengths."),
        **flat(to_dict(config.shares), "shares."),
    }
    if recipe.engine is not None:
        del values["lengths.demonstration_tokens"]
    if recipe.stage == "sft" and recipe.engine is not None:
        values["solved"] = list(config.solved)
    gpu = gpu_named(config.gpu)
    texts = [f"{key} {value}" for key, value in values.items()]
    uncounted = ["drafts", "schemas that prompts share in the cache", "loading", "saving"]
    if recipe.optim.offload:
        uncounted.append("Adam's steps on the host, which are slow (optim.offload)")
    if recipe.reference == "host":
        uncounted.append("moving the reference to the GPU (reference)")
    return "\n" + wrapped(
        f"assumed: {gpu.name} with {gpu.peak / 1e12:g} TFLOP/s in bfloat16 and "
        f"{gpu.bandwidth / 1e12:g} TB/s (data sheet); {', '.join(texts)}. Not counted: "
        f"{', '.join(uncounted)}"
    )


def _gpus(config: Config) -> str:
    """The GPUs in words."""
    return f"{config.gpus} x {config.gpu} of {config.gpu_memory:g} GiB"


def _row(name: str, values: Sequence[str]) -> str:
    return f"{name:<22}" + "".join(f"{value:>14}" for value in values)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}"
