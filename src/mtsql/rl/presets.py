"""Published algorithms as sets of ordinary keys.

A preset sets the objective and not the sizes of a run (batch, group, learning rate). Two values
depend on the run: loss.constant_length only scales the step, and reward.overlong_buffer is a fifth
of the embedded default's trajectory budget, as DAPO's is of its own (4096 of 20480 tokens).
"""

from typing import Literal

Preset = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"]

PRESETS: dict[Preset, dict[str, object]] = {
    # As MTSQL-R1 runs it (paper section 4.5). DeepSeekMath's first form has
    # loss.aggregate=trajectory, loss.kl_coef=0.04, loss.dual_clip=null.
    "grpo": {"advantage.zero_variance": "count", "loss.kl_coef": 0.001},
    # Liu et al. 2025: a trajectory's weight depends neither on its length nor on the spread of
    # its group's rewards; no KL.
    "dr_grpo": {
        "advantage.scale": "none",
        "advantage.zero_variance": "count",
        "loss.aggregate": "constant",
        "loss.constant_length": 1024,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
    },
    # Yu et al. 2025: clip-higher, dynamic sampling, token mean, overlong filtering and soft
    # overlong punishment, no KL. The paper takes 16 optimizer steps a batch (`minibatches`);
    # with a single one nothing is ever clipped.
    "dapo": {
        "loss.clip_high": 0.28,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
        "loss.aggregate": "token",
        "advantage.on_truncated": "mask",
        "advantage.zero_variance": "drop",
        "curriculum.resample_rounds": 4,
        "reward.overlong_buffer": 128,
    },
    # Zheng et al. 2025. The clip range is narrower than the rounding between engine and learner
    # in bf16, hence recomputed old log-probs. The paper takes 4 optimizer steps a batch.
    "gspo": {
        "loss.ratio": "sequence",
        "loss.aggregate": "trajectory",
        "loss.clip_low": 3e-4,
        "loss.clip_high": 4e-4,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
        "advantage.zero_variance": "count",
        "old_logprobs": "recomputed",
    },
    # MiniMax 2025: only the upper bound of the weight is tuned (the paper does not print it; the
    # 5 here is ours); token mean, no KL.
    "cispo": {
        "loss.objective": "cispo",
        "loss.clip_low": 1.0,
        "loss.clip_high": 4.0,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
        "advantage.zero_variance": "count",
    },
    # Ahmadian et al. 2024: a trajectory is one action (its log-prob is the sum over its tokens),
    # and the KL penalty is part of the reward (its coefficient here is a usual one).
    "rloo": {
        "advantage.baseline": "leave_one_out",
        "advantage.scale": "none",
        "advantage.zero_variance": "count",
        "advantage.kl_coef": 0.03,
        "loss.aggregate": "constant",
        "loss.constant_length": 1024,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
    },
    # Hu 2025, with group_size > 1. In the paper the KL penalty of a token counts for the tokens
    # before it only; here all tokens share the trajectory's.
    "reinforce_pp": {
        "advantage.baseline": "batch",
        "advantage.scale": "batch",
        "advantage.zero_variance": "count",
        "advantage.kl_coef": 0.01,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
    },
}
"""Name -> {flag: value}."""
