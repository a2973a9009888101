"""Record trajectories of a model, so that rollout.py can force the same text on an engine.

    python benchmarks/record.py --model.path runs/rl/model --file benchmarks/recorded/quick.json

Plays `num_prompts` turns of the training split with `num_samples` episodes each, as train_rl.py
does, and writes their token ids as JSON.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from flags import run_benchmark

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.engine.config import EngineConfig
from mtsql.engine.engine import Engine
from mtsql.engine.sampling import SamplingConfig
from mtsql.model.policy import ModelConfig, generation_weights
from mtsql.rl.rollout import rollout
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.datasets import DataConfig
from mtsql.workbench import Workbench, set_up


@dataclass(frozen=True)
class Flags:
    """Flags of benchmarks/record.py."""

    file: str = "recorded.json"
    """The JSON file to write."""
    num_prompts: int = 8
    """Number of turns."""
    num_samples: int = 4
    """Number of episodes of each turn."""
    seed: int = 0
    """Seed of the turns and of sampling."""
    max_prompt_tokens: int = 4000
    """Turns with longer prompts end at once."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig(max_replies=6)
    style: PromptStyle | None = None
    """Wording of the prompts. null: the one that the model was trained with."""
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig(max_reply_tokens=96, max_trajectory_tokens=640)


def main(flags: Flags) -> None:
    """Play the turns and write the file."""
    workbench = set_up(flags.model, flags.data, flags.env, flags.style, ("train",), flags.seed)
    trajectories = play(flags, workbench)
    groups = []
    for start in range(0, len(trajectories), flags.num_samples):
        group = trajectories[start : start + flags.num_samples]
        rows = [{"ids": one.ids, "loss_mask": one.loss_mask} for one in group]
        groups.append({"prompt_ids": group[0].prompt_ids, "rows": rows})
    text = json.dumps({"vocab": len(workbench.tokenizer), "groups": groups}, separators=(",", ":"))
    Path(flags.file).write_text(text + "\n")
    num_sampled = sum(one.num_sampled for one in trajectories)
    print(f"{flags.file}: {len(trajectories)} trajectories, {num_sampled} sampled tokens")


def play(flags: Flags, workbench: Workbench) -> list[Trajectory]:
    """The finished trajectories, by turn."""
    turns = list(workbench.corpora["train"].turns)
    random.Random(flags.seed).shuffle(turns)
    with generation_weights(workbench.policy, flags.model.compute_dtype) as model:
        return rollout(
            Engine(model, workbench.renderer.stop_ids, flags.sampling, flags.engine),
            workbench.renderer,
            turns[: flags.num_prompts],
            workbench.env_maker("train"),
            num_samples=flags.num_samples,
            seed=flags.seed,
            update=0,
            max_prompt_tokens=flags.max_prompt_tokens,
            judge=lambda trajectory: trajectory,
        )


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
