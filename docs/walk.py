# %% [markdown]
# # From a dialogue to a gradient
#
# This page follows one question through the trainer: render, sample, parse, execute, reward,
# advantage, loss, gradient. Each step calls the trainer's own functions on a small model. What can
# be computed by hand is, and the page asserts that the function returns the same number.
#
#     python docs/walk.py
#
# prints the results: read them beside this text. Editors that know `# %%` cells (VS Code, PyCharm,
# Jupyter with jupytext) open it as a notebook. It needs no GPU and no download, and leaves no file.
# To change a step of the training, open the file that its cell names.

# %%
import copy
import tempfile
from math import exp
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill

import torch
from accelerate import Accelerator

from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.protocol import TAGS
from mtsql.agent.reply import format_reply, parse_reply
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.learner.logprobs import PolicyModule, token_logprobs
from mtsql.learner.losses import LossConfig, denominator, policy_loss
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packing import Sample, pack
from mtsql.learner.step import Learner
from mtsql.model.policy import EmbeddedConfig, build_embedded, generation_weights
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.replay import read_demonstrations, replay
from mtsql.rl.rewards import RewardConfig, reward_components, total_reward
from mtsql.rl.rollout import rollout
from mtsql.rl.samples import compute_advantages
from mtsql.rl.scored import Scored
from mtsql.run.ranks import Ranks
from mtsql.sql.dialogues import Turn, load_corpus
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.toyworld.world import WorldConfig, write_toy_world

torch.set_num_threads(1)  # sums are then rounded in the same order each time


def title(text: str, file: str) -> None:
    """Print the heading of a step, and the file that takes it in the trainer."""
    print(f"\n==== {text}: {file} ".ljust(80, "="))


def show(text: str, indent: str = "") -> None:
    """Print a text on lines of at most 79 columns."""
    for line in text.splitlines():
        print(fill(line, 79, initial_indent=indent, subsequent_indent=indent + "   "))


# %% [markdown]
# ## 1. A dialogue
# The embedded world has SQLite databases, dialogues in SParC's format, and demonstrations. We take
# one database, and the first turn whose demonstration finds nothing and looks: the database adds a
# code letter to the value in that question, so users say `cairo`, and the column holds `cairo A`.
# In the trainer: `src/mtsql/toyworld/world.py`, `src/mtsql/sql/dialogues.py`.

# %%
title("1. A dialogue", "src/mtsql/toyworld/world.py")
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name) / "world"
write_toy_world(folder, size=WorldConfig(num_train_databases=1, num_dev_databases=1))
corpus = load_corpus(folder / "train.json", folder / "tables.json", folder / "database")
demonstrations = read_demonstrations(folder / "demonstrations.jsonl")
thoughts = {name: [one.think for one in replies] for name, replies in demonstrations.items()}
turn = next(one for one in corpus.turns if "nothing , look" in thoughts[one.turn_id])
database = corpus.databases[turn.db_id]
for question, sql in [*turn.history, (turn.question, turn.sql)]:
    show(f"question  {question}\ngold SQL  {sql}")


# %% [markdown]
# ## 2. Render
# The environment writes the first message: the schema, the earlier turns with their SQL, and the
# question. The gold SQL of this turn is not in it. The renderer turns it into ids, in the model's
# chat format.
# In the trainer: `src/mtsql/agent/prompts.py` (the words), `src/mtsql/agent/env.py` (the
# environment), `src/mtsql/model/rendering.py` (the ids).


# %%
def make_env(turn: Turn) -> SqlEnv:
    """A fresh environment for one episode of the turn."""
    return SqlEnv(turn, database, EnvConfig(), "brief")


title("2. Render", "src/mtsql/model/rendering.py")
texts = [make_env(one).reset()[0][0]["content"] for one in corpus.turns]
texts += [format_reply(reply) for replies in demonstrations.values() for reply in replies]
renderer = Renderer(train_tokenizer(texts, vocab_size=600, tags=TAGS))
messages, tool_schemas = make_env(turn).reset()
prompt = renderer.render_prompt(messages, tool_schemas)
show(renderer.text(prompt))
print(f"These are {len(prompt)} ids: {str(prompt[:12])[1:-1]}, ...")
assert turn.sql not in renderer.text(prompt)

# %% [markdown]
# ## 3. A policy with four habits
# A model with random weights writes noise, and a group of rewards that are all 0 teaches nothing.
# So ours first learns, by SFT for this one prompt, four habits. One is good: it sees that its query
# returns nothing, looks at the data, and corrects itself. The rewards have to find it out. (A real
# warm start has many prompts, and 60 % of its demonstrations with an unknown value guess it.)
# In the trainer: `train_sft.py`, `src/mtsql/rl/replay.py`.

# %%
title("3. A policy with four habits", "train_sft.py")
value = turn.sql.split("'")[1]  # as the database spells it
good = replay(turn, demonstrations[turn.turn_id], make_env(turn), renderer)
lessons = [good.to_sample([])]
as_asked = turn.sql.replace(value, value[:-2])  # without the code that the database adds
malformed = f'<tool_call>\n{{"name": "exec_sql", "sql": "{turn.sql}"}}\n</tool_call>'
habits = {
    "answers at once, by a lucky guess": f"<answer_sql>{turn.sql}</answer_sql>",
    "answers at once, as the user spells it": f"<answer_sql>{as_asked}</answer_sql>",
    "calls a tool in a wrong format": malformed,
}
print(f"checks and corrects itself: the demonstration, {len(good.reply_spans)} replies")
for name, text in habits.items():
    ids = renderer.render_reply(text)
    lessons.append(Sample(prompt, ids, loss_mask=[1] * len(ids)))
    show(f"{name}: {text!r}")
SIZE = EmbeddedConfig(num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32)
policy = build_embedded(renderer.tokenizer, SIZE, seed=0)
accelerator = Accelerator(cpu=True)
teacher = Learner(policy, accelerator, OptimConfig(), max_batch_tokens=8192)
losses = [teacher.optimizer_step(lessons, lr=3e-3)["loss"] for _ in range(150)]
print(f"SFT loss per token: {losses[0]:.2f}, and {losses[-1]:.2f} after {len(losses)} steps")

# %% [markdown]
# ## 4. Sample
# The policy plays the turn six times from the same prompt: a group of G = 6. When a reply ends, its
# environment acts and the observation is appended. The mask is born with the token: 1 if the policy
# sampled it, 0 if the environment wrote it. Tokens with mask 0 are read, but never trained on, and
# have no log-prob. The stop token `<|im_end|>` has mask 1, so the policy learns when to stop.
# In the trainer: `src/mtsql/rl/rollout.py`, `src/mtsql/rl/trajectory.py`, and the engine in
# `src/mtsql/engine/engine.py`.

# %%
title("4. Sample", "src/mtsql/rl/rollout.py")
sampling = SamplingConfig(max_reply_tokens=96, max_trajectory_tokens=400)
with generation_weights(policy) as model:
    trajectories = rollout(
        Engine(model, renderer.stop_ids, sampling, EngineConfig(cache_bytes=2**26)),
        renderer,
        [turn],
        make_env,
        num_samples=6,
        seed=72,  # all four habits are drawn
        update=0,
        max_prompt_tokens=1000,
        judge=lambda trajectory: trajectory,  # in the trainer it computes the reward
    )
print("sample  replies  tokens  of them sampled  outcome")
for i, one in enumerate(trajectories):
    print(f"{i:6}  {len(one.reply_spans):7}  {len(one.ids):6}  ", end="")
    print(f"{sum(one.loss_mask):15}  {one.outcome.value}")
    assert sum(one.loss_mask) == sum(end - start for start, end in one.reply_spans)

longest = max(trajectories, key=lambda one: len(one.ids))
end = longest.reply_spans[0][1] + 15
print(f"\nFirst {end} tokens of the longest: text (up to 15 characters), id, mask, log-prob")
for start in range(0, end, 5):
    above, below = "", ""
    for i in range(start, min(start + 5, end)):
        above += f"{repr(renderer.text([longest.ids[i]]))[1:-1]:16.15}"
        logprob = f"{longest.logprobs[i]:.2f}" if longest.loss_mask[i] else "-"
        below += f"{f'{longest.ids[i]:3} {longest.loss_mask[i]} {logprob}':16}"
    print(f"{above.rstrip()}\n{below.rstrip()}")

# %% [markdown]
# ## 5. Parse
# The text of a reply becomes data: a tool call, an answer, or a named error. Any text gives one of
# the three. The verdict is what the reply says about the result before it.
# In the trainer: `src/mtsql/agent/reply.py`; the tags are in `src/mtsql/agent/protocol.py`.

# %%
title("5. Parse", "src/mtsql/agent/reply.py")
tools = {tool.name: tool.parameters for tool in longest.env.tools}
replies = [renderer.decode(longest.ids[start:end]) for start, end in longest.reply_spans]
for text in [*replies[:2], malformed, "<answer_sql>SELECT 1"]:
    reply = parse_reply(text, tools)
    show(repr(text))
    show(f"-> {reply.action}, verdict: {reply.exec_verdict}", "  ")

# %% [markdown]
# ## 6. Execute
# Queries run in a sandbox: read-only, in a process of its own, with a budget of steps of SQLite's
# virtual machine. So an endless query ends at the same place on every machine. An error is a value,
# too: the model reads it as an observation.
# In the trainer: `src/mtsql/agent/tools.py`, `src/mtsql/sql/sandbox.py`.

# %%
title("6. Execute", "src/mtsql/sql/sandbox.py")
endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
for sql in (turn.sql, "SELECT town FROM singer", "DROP TABLE singer", endless):
    result = run_query(database.path, sql, QueryConfig(max_vm_steps=1_000_000))
    show(sql)
    show(f"-> {result.status.value}: {result.message or result.rows}", "  ")
print("What the longest sample called and read:")
for record in longest.env.records[:-1]:  # the last reply ends the episode
    show(f"{record.reply.action} -> {record.observation!r}")

# %% [markdown]
# ## 7. Reward
# Each component of a finished episode is a number, and the reward is their weighted sum. ex: the
# answer returns the gold query's rows. em: it has the gold query's clauses, values aside; but an
# earlier turn's query with another value earns this only if its rows are right. propose: the
# clauses of the last call. The other two: the verdicts fit the results. (One of two did not: a
# count of 0 is a row, and no_pass is for errors and empty results.) The last three count only after
# a right answer. A new component is a function in rewards.py.
# In the trainer: `src/mtsql/rl/rewards.py`, `src/mtsql/rl/process.py` (verdicts),
# `src/mtsql/judge/guard.py` (what is right by accident only).

# %%
title("7. Reward", "src/mtsql/rl/rewards.py")
paid = RewardConfig()
group = []
for one in trajectories:
    components = reward_components(one, paid)
    group.append(Scored(one, components, total_reward(components, paid.weights)))
print("sample          weight" + "".join(f"{i:9}" for i in range(len(group))))
for name in group[0].components:
    print(f"{name:16}{getattr(paid.weights, name):6}", end="")
    print("".join(f"{one.components[name]:9.2f}" for one in group))
print("reward".ljust(22) + "".join(f"{one.reward:9.3f}" for one in group))
ends = [one.env.final_sql or one.outcome.value for one in trajectories]
ends = [(text.split("'") + [text])[1] for text in ends]  # of an answer, only the value
print("ends with".ljust(22) + "".join(f"{text:>9}" for text in ends))

# %% [markdown]
# ## 8. Advantage
# GRPO compares a sample with its group: its reward minus the group's mean, divided by the group's
# standard deviation. The advantages add up to 0. All sampled tokens of a trajectory have the same
# one. In a group of equal rewards all are 0, so nothing is learned from it.
# In the trainer: `src/mtsql/rl/advantages.py`, `src/mtsql/rl/samples.py`.

# %%
title("8. Advantage", "src/mtsql/rl/advantages.py")
rewards = [one.reward for one in group]
relative = AdvantageConfig()
samples = compute_advantages([group], Ranks(), relative)
advantages = [one.advantages[0] for one in group]  # each reply of a trajectory has the same
middle, spread = mean(rewards), stdev(rewards)
print(f"mean {middle:.3f}, standard deviation {spread:.3f}")
for i, (reward, advantage) in enumerate(zip(rewards, advantages)):
    by_hand = (reward - middle) / (spread + relative.eps)
    print(f"sample {i}: ({reward:.3f} - {middle:.3f}) / {spread:.3f} = {by_hand:+.3f}", end="")
    print(f", the function: {advantage:+.3f}")
    assert abs(by_hand - advantage) < 1e-9
assert abs(sum(advantages)) < 1e-9 < max(advantages)

# %% [markdown]
# ## 9. Batch and log-probs
# The samples become one flat row of T tokens without padding, in which the shared prompt stands
# once. The loss is taken at P positions, those with mask 1. The hidden state of a token predicts
# the next token; this shift is made here and nowhere else. The learner's log-probs equal those at
# which the engine has sampled.
# In the trainer: `src/mtsql/learner/packing.py`, `src/mtsql/learner/logprobs.py`.

# %%
title("9. Batch and log-probs", "src/mtsql/learner/packing.py")
# The KL has 100 times the paper's weight, to be seen in the numbers; no dual clip, to be short.
settings = LossConfig(kl_coef=0.1, dual_clip=None)
learner = Learner(
    policy, accelerator, OptimConfig(), max_batch_tokens=8192, loss=settings, has_reference=True
)
samples = learner.with_reference(samples)  # the reference of the KL is the policy as it is now
[batch] = pack(samples, 8192)
print(f"T = {len(prompt)} of the prompt + {sum(len(s.ids) for s in samples)} = {len(batch.ids)}")
print(f"P = {len(batch.targets)}, the sum of all masks")
assert len(batch.targets) == sum(sum(one.loss_mask) for one in trajectories)
for source, target in zip(batch.sources[:3].tolist(), batch.targets[:3].tolist()):
    token = renderer.text([batch.ids[source].item()])
    print(f"index {source}, token {token!r}, predicts {renderer.text([target])!r}")
with torch.no_grad():
    logprobs, entropy = token_logprobs(policy, batch)  # (P,), (P,)
gap = (logprobs - batch.old_logprobs).abs().max()
print(f"largest difference between learner and engine: {gap:.0e}")
assert gap < 1e-4

# %% [markdown]
# ## 10. Loss
# A token's ratio is its probability now over that at sampling. Its loss is -advantage * ratio, and
# the ratio is clipped where it has already moved far enough in the direction of the advantage. The
# KL to the reference is added. The function returns a sum, which is divided once, by the number of
# trained tokens. Before the first step each ratio is 1 and each KL is 0, so the loss is the mean of
# -advantage. Its value says little; its gradient trains.
# In the trainer: `src/mtsql/learner/losses.py`.


# %%
def loss_by_hand(now: float, old: float, ref: float, advantage: float) -> tuple[float, ...]:
    """Ratio, KL and loss of one token."""
    ratio = exp(now - old)
    clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
    loss = max(-advantage * ratio, -advantage * clipped)
    kl = exp(ref - now) - (ref - now) - 1
    return ratio, kl, loss + settings.kl_coef * kl


def show_loss(logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Print the loss by hand and by the function, and the eight least likely tokens: those at which
    the habits part. Returns the function's statistics."""
    columns = (logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages)
    rows = [(*row, *loss_by_hand(*row)) for row in zip(*(column.tolist() for column in columns))]
    print("token            sampled at      now  advantage   ratio     KL    loss")
    for p in sorted(range(len(rows)), key=lambda p: rows[p][1])[:8]:
        now, old, _, advantage, ratio, kl, loss = rows[p]
        text = repr(renderer.text([batch.targets[p].item()]))
        print(f"{text:15.15}  {old:10.3f} {now:8.3f}", end="")
        print(f"  {advantage:+9.3f}  {ratio:6.3f} {kl:6.3f}  {loss:+6.3f}")
    total = sum(row[-1] for row in rows)
    function, stats = policy_loss(logprobs, entropy, batch, settings)
    divisor = denominator(samples, settings)
    print(f"by hand       {total:.3f} / {len(rows)} tokens = {total / len(rows):.5f}")
    print(f"the function  {function:.3f} / {divisor:.0f} tokens = {function / divisor:.5f}")
    assert abs(total - function) < 1e-3 and divisor == len(rows)
    return stats


title("10. Loss", "src/mtsql/learner/losses.py")
show_loss(logprobs)

# %% [markdown]
# ## 11. Gradient
# Autograd computes the derivative of the loss with respect to each weight. We check one: move the
# weight a little up and down, and see how the loss changes. (In float64: float32 rounds too much.)
# In the trainer: `src/mtsql/learner/step.py`; gradients that are written by hand are in
# `src/mtsql/model/layers.py`, `src/mtsql/learner/packed_attention.py` and
# `src/mtsql/learner/logprobs.py`.

# %%
title("11. Gradient", "src/mtsql/learner/step.py")
wide = PolicyModule(copy.deepcopy(policy).double())


def loss_now() -> torch.Tensor:
    """The mean loss of the batch, with the weights that `wide` has now."""
    return policy_loss(*wide(batch), batch, settings)[0] / denominator(samples, settings)


loss_now().backward()
weight = wide.model.lm_head.weight  # (V, W): a row for each token of the vocabulary
row, column = divmod(weight.grad.abs().argmax().item(), weight.shape[1])
shifted = []
with torch.no_grad():
    for shift in (1e-4, -2e-4):
        weight[row, column] += shift
        shifted.append(loss_now().item())
gradient, slope = weight.grad[row, column].item(), (shifted[0] - shifted[1]) / 2e-4
print(f"weight {column} of the token {renderer.text([row])!r}, which has the largest gradient:")
print(f"autograd {gradient:+.6f}, by differences {slope:+.6f}")
assert abs(gradient - slope) < 1e-4

# %% [markdown]
# ## 12. One optimizer step
# The step makes tokens with a positive advantage likelier and the others less likely. A token that
# two samples share, after the same text, gets the sum of both: the answers at once begin alike, and
# most are wrong. So the lucky guess gains little; its code, which only it has, gains (step 13).
# In the trainer: `src/mtsql/learner/step.py`; `train_rl.py` is the loop around all of this.

# %%
title("12. One optimizer step", "train_rl.py")
result = learner.optimizer_step(samples, lr=2e-4)
print(f"loss {result['loss']:.5f}, norm of the gradient {result['grad_norm']:.3f}")
with torch.no_grad():
    after, entropy = token_logprobs(policy, batch)
print("sample  reward  advantage  log-prob before    after   change")
changes = []
for i, (reward, advantage) in enumerate(zip(rewards, advantages)):
    mine = batch.trajectory_index == batch.indices.index(i)  # (P,)
    old, new = logprobs[mine].sum().item(), after[mine].sum().item()
    changes.append(new - old)
    print(f"{i:6}  {reward:6.3f}  {advantage:+9.3f}  {old:15.3f}  {new:7.3f}  {new - old:+7.3f}")
assert changes[rewards.index(max(rewards))] > 0 > changes[rewards.index(min(rewards))]

# %% [markdown]
# ## 13. The same samples again
# If a second step uses the same samples, the ratios are not 1 any more. Where one has left the
# range from 0.8 to 1.2 in the direction of its advantage, the clipped loss is constant and has no
# gradient; only the KL has one, which pulls back. The paper takes one step for each rollout, in
# which nothing is clipped. The flags `num_passes` and `minibatches` take more.
# In the trainer: `src/mtsql/learner/losses.py`, and `learn` in `train_rl.py`.

# %%
title("13. The same samples again", "src/mtsql/learner/losses.py")
stats = show_loss(after)
print(f"clipped: {stats['clip_high']} tokens above, {stats['clip_low']} below")
scratch.cleanup()
