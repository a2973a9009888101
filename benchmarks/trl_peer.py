"""Make TRL's GRPOTrainer play a given workload with its own code, as a contestant.

This needs `pip install trl`; mtsql itself does not. How the trainer is driven, and what this costs:

- **Ids.** The tokenizer is a stand-in that maps the word `t17` to the id 17. Its chat template
  writes contents as they are, so prompts and observations have exactly the workload's ids. TRL's
  rendering, tokenizing, suffix and mask code all run.
- **Lengths of replies.** `model.generate` gets a logits processor that forbids the end-of-turn id
  until a row has its length, and then allows only that id: one column is written per token. As
  always in `generate`, rows that are done stay in the batch until the longest one is done. No token
  beyond the longest row is generated.
- **Tool calls.** Instead of reading text, the stand-in's `parse_response` answers with a call to
  `look` for every reply but the last. That is cheaper than the parser which it replaces. `look`
  returns the observation at once (no SQL).
- **Given trajectories** (for the update alone) enter by `rollout_func`, TRL's own hook for custom
  rollouts.

Settings are TRL's defaults, with these exceptions: SDPA attention, no saving or reports, no shuffle
of the prompts, the group's size, a completion budget that nothing exceeds, and the precision. The
precision is what the benchmark is asked for. TRL's own default is bf16 autocast, on CPUs too, which
is faster than fp32 on CPUs with bf16 instructions such as AMX and slower on others.

`tuned` turns off two more things that take time. They are gradient checkpointing, which is on by
default, and the projection of prompt positions to the vocabulary, which TRL omits only on a GPU.
TRL's continuous batching and vLLM are not used.

Legend: B rows of a generation batch, V vocabulary.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import Stopwatch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

TEMPLATE = (
    "{%- for m in messages %}{{- m.content + ' ' }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- call.function.name + ' ' + (call.function.arguments | tojson) + ' ' }}{%- endfor %}"
    "{%- if m.role == 'assistant' %}{{- eos_token + ' ' }}{%- endif %}{%- endfor %}"
)
"""The template writes contents only. An observation follows the reply's end-of-turn id."""


def to_text(ids: list[int]) -> str:
    """Words that the stand-in for the tokenizer reads as exactly these ids."""
    return " ".join(f"t{i}" for i in ids)


@dataclass
class Script:
    """The replies and observations of one rollout, and how far the rollout is."""

    lengths: list[list[int]] = field(default_factory=list)
    """Number of tokens of each reply, by row and reply."""
    observations: list[list[list[int]]] = field(default_factory=list)
    """Ids of each observation, by row and reply."""
    num_generated: int = 0
    """Number of calls of `generate` so far. Each call generates one reply of every row."""
    num_parsed: int = 0
    """Number of replies read so far: the first reply of every row, then the second ones."""

    def begin(self, lengths: Iterable[Iterable[int]], observations: list[list[list[int]]]) -> None:
        """Start a rollout."""
        self.lengths = [list(map(int, row)) for row in lengths]
        self.observations = observations
        self.num_generated = 0
        self.num_parsed = 0


class Words(PreTrainedTokenizerFast):
    """A stand-in for the tokenizer. `script` says what a reply is."""

    script: Script

    def parse_response(
        self,
        response: list[int],
        schema: object = None,
        *,
        prefix: object = None,
        tools: object = None,
    ) -> dict:
        """Return a call to `look`; for a row's last reply, and for given trajectories, a plain
        answer."""
        message = {"role": "assistant", "content": ""}
        if not self.script.lengths:
            return message
        reply, row = divmod(self.script.num_parsed, len(self.script.lengths))
        self.script.num_parsed += 1
        if reply + 1 < len(self.script.lengths[row]):
            call = {"name": "look", "arguments": {"row": row, "reply": reply}}
            message["tool_calls"] = [{"type": "function", "function": call}]
        return message


def make_words(vocab: int, script: Script) -> Words:
    """Word `t<i>` is id i; the last three ids are unknown, padding and end of turn."""
    unknown = f"t{vocab - 3}"
    pad = f"t{vocab - 2}"
    eos = f"t{vocab - 1}"
    ids = {f"t{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = Words(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        unk_token=unknown,
        chat_template=TEMPLATE,
    )
    words.response_template = {}  # TRL then asks parse_response
    words.script = script
    return words


class ForcedLengths(LogitsProcessor):
    """Row b ends with `eos` after exactly `lengths[b]` tokens."""

    def __init__(self, lengths: list[int], eos: int) -> None:
        self.lengths = torch.tensor(lengths)  # (B,)
        self.eos = eos
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        ends = self.lengths == self.step  # (B,)
        scores[:, self.eos] = float("-inf")  # (B, V)
        scores[ends] = float("-inf")
        scores[ends, self.eos] = 0.0
        return scores


class Steps(TrainerCallback):
    """A callback that calls `before(step)` and `after(step)` around each optimizer step, which
    includes generation, micro-batches and AdamW."""

    def __init__(self, before: Callable[[int], None], after: Callable[[int], None]) -> None:
        self.before = before
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.after(state.global_step - 1)


class Slots:
    """A counter of the token slots that ran through the model since `clear`. Padding counts; the
    recomputation of gradient checkpointing does not."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.clear()
        model.base_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        self.count += ids.numel()
        self.calls += 1

    def clear(self) -> None:
        """Set the count to 0."""
        self.count = 0
        self.calls = 0


@dataclass
class Peer:
    """A trainer ready to be driven, and the meters on it."""

    trainer: Any
    script: Script
    slots: Slots
    folder: tempfile.TemporaryDirectory
    """The trainer's output folder, which lives as long as the trainer."""
    rollout: dict = field(default_factory=dict)
    """secs, cpu_secs, token_slots and model_calls of the last rollout."""


def make_peer(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    num_samples: int,
    batch: int,
    max_completion: int,
    num_steps: int,
    rewards: list[float],
    prompts_per_step: int,
    tuned: bool,
    dtype: str = "float32",
    given: Callable[[], dict] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Peer:
    """A GRPOTrainer over `prompts`, in this order, `prompts_per_step` for each optimizer step and
    `num_samples` trajectories for each prompt.

    `batch` is its per_device_train_batch_size. `rewards` has one reward for each row of an
    optimizer step. `given` is a `rollout_func` that returns the trajectories; without it, the
    trainer generates them and calls the tool.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    rows = prompts_per_step * num_samples
    if rows % batch:
        raise ValueError(
            f"--trl_batch(es) {batch}: it must divide the {rows} trajectories of an update"
        )
    if tuned:
        if not hasattr(utils, "_use_triton"):
            raise ValueError(
                "--who trl_tuned: this TRL decides in another way what it projects; compare with "
                "trl only"
            )
        # Project only the positions of completions, as on a GPU.
        utils._use_triton = lambda device: True
    script = Script()
    slots = Slots(model)
    folder = tempfile.TemporaryDirectory()
    config = GRPOConfig(
        output_dir=folder.name,
        use_cpu=True,
        bf16=dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=num_steps,
        num_generations=num_samples,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=rows // batch,
        max_completion_length=max_completion,
        shuffle_dataset=False,
        gradient_checkpointing=not tuned,
        dataloader_pin_memory=False,
    )

    def look(row: int, reply: int) -> str:
        """Look something up.

        Args:
            row: The row.
            reply: The reply.
        """
        return to_text(script.observations[row][reply])

    def reward(completions: list, **_: Any) -> list[float]:
        return list(rewards[: len(completions)])

    generate = model.generate

    def forced(*args: Any, **kwargs: Any) -> Any:
        ends = [lengths[script.num_generated] for lengths in script.lengths]
        script.num_generated += 1
        forcing = LogitsProcessorList([ForcedLengths(ends, model.config.vocab_size - 1)])
        return generate(*args, logits_processor=forcing, **kwargs)

    model.generate = forced
    model.generation_config.eos_token_id = None  # only the stand-in's id ends a reply
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        processing_class=make_words(model.config.vocab_size, script),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": to_text(p)}]} for p in prompts]
        ),
        tools=None if given else [look],
        rollout_func=(lambda prompts, trainer: given()) if given else None,
        callbacks=list(callbacks),
    )
    peer = Peer(trainer, script, slots, folder)
    _meter_rollout(peer, check=not given)
    return peer


def _meter_rollout(peer: Peer, check: bool) -> None:
    """Time `_generate` (render, generate, tool loop). With `check`, raise a RuntimeError if its
    trajectories differ from those of the script."""
    inner = peer.trainer._generate

    def generate(prompts: list) -> tuple:
        peer.slots.clear()
        watch = Stopwatch()
        output = inner(prompts)
        peer.rollout = {
            **watch.read(),
            "token_slots": peer.slots.count,
            "model_calls": peer.slots.calls,
        }
        if check:
            for row, (ids, mask) in enumerate(zip(output[1], output[2], strict=True)):
                _check_row(peer.script, row, len(ids), sum(mask))
        peer.slots.clear()
        return output

    peer.trainer._generate = generate


def _check_row(script: Script, row: int, num_tokens: int, num_sampled: int) -> None:
    wanted_sampled = sum(script.lengths[row])
    wanted_tokens = wanted_sampled + sum(map(len, script.observations[row]))
    if (num_tokens, num_sampled) != (wanted_tokens, wanted_sampled):
        raise RuntimeError(
            f"row {row}: TRL has {num_tokens} tokens, {num_sampled} sampled; "
            f"the script says {wanted_tokens}, {wanted_sampled}"
        )
