"""TRL's GRPOTrainer as a contestant: its own code, made to play a given workload. Needs `pip install trl`, which the
product does not.

How it is driven, and what that costs it:

- **Ids.** The tokenizer is a double that maps the word `t17` to the id 17, and its chat template writes contents as
  they are, so prompts and observations have exactly the workload's ids. TRL's rendering, tokenizing, suffix and
  mask code all run.
- **Lengths of replies.** `model.generate` gets a logits processor that forbids the end-of-turn id until a row has its
  length and allows only that id then: one column written a step. Rows that are done stay in the batch until the longest
  is, as always in `generate`; no token beyond the longest row's is made.
- **Tool calls.** The double's `parse_response` answers with a call to `look` for every reply but the last instead of
  reading text, which is cheaper than the parser it replaces. `look` returns the observation at once (no SQL).
- **Given trajectories** (for the update alone) enter by `rollout_func`, TRL's own hook for custom rollouts.

Settings are TRL's defaults but for: SDPA attention, no saving or reports, no shuffle of the prompts, the group's size,
a completion budget that never cuts, and the precision the benchmark is asked for (TRL's own default is bf16 autocast,
on CPUs too: faster than fp32 where there are bf16 instructions such as AMX, slower where they are emulated). `tuned`
turns off two more things that cost it time: gradient checkpointing, on by default, and the projection of prompt
positions to the vocabulary, which TRL leaves out on a GPU only. Its continuous batching and vLLM are not used.

B rows of a generation batch, V vocabulary.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

TEMPLATE = (
    "{%- for m in messages %}{{- m.content + ' ' }}"
    "{%- for call in m.tool_calls or [] %}{{- call.function.name + ' ' + (call.function.arguments | tojson) + ' ' }}"
    "{%- endfor %}{%- if m.role == 'assistant' %}{{- eos_token + ' ' }}{%- endif %}{%- endfor %}"
)
"""Contents and nothing else: an observation is its own words, after the reply's end-of-turn id."""


def to_text(ids: list[int]) -> str:
    """Words the double's tokenizer reads as exactly these ids."""
    return " ".join(f"t{i}" for i in ids)


@dataclass
class Script:
    """What is to happen: `lengths[row][reply]` and `observations[row][reply]` of one rollout, and
    how far it is."""

    lengths: list[list[int]] = field(default_factory=list)
    observations: list[list[list[int]]] = field(default_factory=list)
    num_generated: int = 0
    """Calls of `generate` so far: each makes one reply of every row."""
    num_parsed: int = 0
    """Replies read so far: row by row, then the next reply."""

    def begin(self, lengths, observations) -> None:
        """Start a rollout."""
        self.lengths, self.observations = [list(map(int, row)) for row in lengths], observations
        self.num_generated = self.num_parsed = 0


class Words(PreTrainedTokenizerFast):
    """The tokenizer's double. `script` tells what a reply is."""

    script: Script

    def parse_response(self, response, schema=None, *, prefix=None, tools=None) -> dict:
        """A call to `look`, or at the end of the row's replies (and for given trajectories) a plain
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
    """Word `t<i>` is id i; the last three ids are end of turn, padding and unknown."""
    eos, pad, unknown = (f"t{vocab - i}" for i in (1, 2, 3))
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token=unknown))
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

    def __init__(self, lengths: list[int], eos: int):
        self.lengths, self.eos, self.step = torch.tensor(lengths), eos, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        ends = self.lengths == self.step  # (B,)
        scores[:, self.eos] = float("-inf")  # (B, V)
        scores[ends] = float("-inf")
        scores[ends, self.eos] = 0.0
        return scores


class Steps(TrainerCallback):
    """Calls `before(n)` and `after(n)` around each optimizer step: generation, micro-batches and
    AdamW lie between."""

    def __init__(self, before: Callable[[int], None], after: Callable[[int], None]):
        self.before, self.after = before, after

    def on_step_begin(self, args, state, control, **_):
        self.before(state.global_step)

    def on_step_end(self, args, state, control, **_):
        self.after(state.global_step - 1)


class Slots:
    """Token slots that ran through the model since `clear`, padding included (recomputation of
    checkpoints is not)."""

    def __init__(self, model):
        self.count, self.calls = 0, 0
        model.base_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.count += (ids if ids is not None else kwargs["inputs_embeds"][..., 0]).numel()
        self.calls += 1

    def clear(self) -> None:
        self.count, self.calls = 0, 0


@dataclass
class Peer:
    """A trainer ready to be driven, and the meters on it."""

    trainer: object
    script: Script
    slots: Slots
    rollout: dict = field(default_factory=dict)
    """Of the last rollout: secs, cpu_secs, token_slots, model_calls."""


def make_peer(
    model,
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
    callbacks: list = (),
) -> Peer:
    """A GRPOTrainer over `prompts` (in this order, `prompts_per_step` an optimizer step,
    `num_samples` each).

    `batch`: its per_device_train_batch_size. `rewards`: one for each row of a step. `given`:
    trajectories instead of generation, as `rollout_func` returns them; otherwise it generates and
    calls the tool.
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
                "--who trl_tuned: this TRL decides in another way what it projects; compare with trl only"
            )
        utils._use_triton = lambda device: (
            True
        )  # score the completions' positions only, as on a GPU
    script, slots = Script(), Slots(model)
    folder = tempfile.TemporaryDirectory()
    config = GRPOConfig(
        output_dir=folder.name,
        use_cpu=True,
        bf16=dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_replies=num_steps,
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

    def reward(completions, **_) -> list[float]:
        return list(rewards[: len(completions)])

    generate = model.generate

    def forced(*args, **kwargs):
        ends = [lengths[script.num_generated] for lengths in script.lengths]
        script.num_generated += 1
        forcing = LogitsProcessorList([ForcedLengths(ends, model.config.vocab_size - 1)])
        return generate(*args, logits_processor=forcing, **kwargs)

    model.generate = forced
    model.generation_config.eos_token_id = None  # only the double's id ends a reply
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
    peer = Peer(trainer, script, slots)
    peer.folder = folder  # lives as long as the trainer
    _meter_rollout(peer, check=not given)
    return peer


def _meter_rollout(peer: Peer, check: bool) -> None:
    """Time `_generate` (render, generate, tool loop) and see that it did what the script says."""
    inner = peer.trainer._generate

    def generate(prompts):
        peer.slots.clear()
        start, cpu = time.perf_counter(), time.process_time()
        output = inner(prompts)
        secs, cpu_secs = time.perf_counter() - start, time.process_time() - cpu
        peer.rollout = {
            "secs": secs,
            "cpu_secs": cpu_secs,
            "token_slots": peer.slots.count,
            "model_calls": peer.slots.calls,
        }
        if check:
            script = peer.script
            for row, (ids, mask) in enumerate(zip(output[1], output[2], strict=True)):
                sampled, seen = sum(script.lengths[row]), sum(map(len, script.observations[row]))
                if (len(ids), sum(mask)) != (sampled + seen, sampled):
                    raise RuntimeError(
                        f"row {row}: TRL has {len(ids)} tokens, {sum(mask)} sampled; "
                        f"the script says {sampled + seen}, {sampled}"
                    )
        peer.slots.clear()
        return output

    peer.trainer._generate = generate
