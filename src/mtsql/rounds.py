"""A round of stage 1: what it rolls out and selects, and what it leaves in the run folder.

    <run>/rounds/round0/
        chunks/rank0.jsonl     finished chunks, while the round samples (rl/sweep.py)
        pool.jsonl             the trajectories that the round has added (rl/pool.py)
        chat_template.jinja    with which other trainers make their ids and mask
        coverage.json          what is solved, and how the rollouts went (rl/coverage.py)
        dev.json               held-out scores after the round
        model/                 the model after the round, an ordinary folder
    <run>/rounds/base/         the model before the first round, with selftaught.start=base

`train_sft.py` has the loop.
"""

import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtsql.engine.counts import EngineCounts
from mtsql.engine.engine import Engine
from mtsql.files import parse_json, read_json, read_lines
from mtsql.judge.hardness import hardness
from mtsql.learner.packing import Sample
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.collect import Collector
from mtsql.rl.coverage import (
    add_counts,
    coverage,
    coverage_lines,
    coverage_metrics,
    rollout_counts,
)
from mtsql.rl.embeddings import Embedder, open_embedder
from mtsql.rl.evaluate import scores_as_rows, summarize
from mtsql.rl.pool import PoolRecord, pool_record, record_sample, write_pool, write_template
from mtsql.rl.rewards import RewardConfig
from mtsql.rl.rollout import turn_key
from mtsql.rl.rollout_metrics import engine_metrics, sweep_metrics
from mtsql.rl.scored import Group
from mtsql.rl.selftaught import select
from mtsql.rl.sweep import Swept
from mtsql.rl.trajectory import Trajectory
from mtsql.run.checkpoint import kept_chunks
from mtsql.run.signals import peers_may_stop
from mtsql.session import Session
from mtsql.sql.dialogues import Turn

if TYPE_CHECKING:  # the scripts import the package, not the other way round
    import train_sft

CHUNKS, POOL, COVERAGE = "chunks", "pool.jsonl", "coverage.json"
"""What a round's folder holds."""
ADVICE_TOY = "start from the embedded world's demonstrations: --source demonstrations"
ADVICE = (
    "start from demonstrations made of the gold SQL (--source gold), or from the pool of a "
    "stronger model (--source file)"
)
"""What to do with a model that solves nothing: on the embedded world, and on other data."""


def round_folder(config: "train_sft.Config", number: int) -> Path:
    """The folder of a round."""
    return Path(config.run) / "rounds" / f"round{number}"


def make_collector(config: "train_sft.Config", session: Session) -> Collector:
    """What plays the rollouts and evaluations of a run of stage 1."""
    workbench, selftaught = session.workbench, config.selftaught
    return Collector(
        ranks=session.ranks,
        policy=workbench.policy,
        compute_dtype=config.model.compute_dtype,
        renderer=workbench.renderer,
        corpora=workbench.corpora,
        env_maker=workbench.env_maker,
        engine=config.engine,
        sampling=replace(config.sampling, temperature=selftaught.temperature),
        reward=RewardConfig(guard=selftaught.guard),
        advantage=AdvantageConfig(),
        group_size=selftaught.samples_per_turn,
        resample_rounds=0,
        max_prompt_tokens=config.max_prompt_tokens,
        seed=config.seed,
        flops=session.meter.model,
    )


@dataclass(frozen=True)
class Round:
    """What a round has collected on all ranks."""

    samples: list[Sample]
    """The chosen trajectories."""
    solved: set[str]
    """The turns with a right rollout."""


def collect_round(
    turns: list[Turn],
    solved: set[str],
    config: "train_sft.Config",
    session: Session,
    number: int,
    update: int,
) -> Round:
    """Roll out those of the run's `turns` that are not in `solved` with the current policy, and
    choose from the right trajectories. A round that the resumed run has finished is read instead.

    `update` counts the finished optimizer steps. What was found is printed, logged and kept.
    ValueError with advice if the model solves none of the first turns.
    """
    ranks, log = session.ranks, session.log
    place = round_folder(config, number)
    kept: dict[str, Any] = {}
    ranks.on_main(lambda: kept.update(_read_round(place) if config.resume else {}))
    kept = ranks.from_main(lambda: kept)
    if kept:
        records, content = kept["records"], kept["content"]
        swept = Swept([], EngineCounts(**content["work"]), EngineCounts())
    else:
        left = [turn for turn in turns if turn.turn_id not in solved]
        swept = _play_round(left, config, session, number)
        records = [record for part in swept.found for record in part["kept"]]
        counts = add_counts(part["counts"] for part in swept.found)
        now_solved = solved | _solved(counts)
        content = {
            "round": number,
            "turns": len(left),
            "solved": len(_solved(counts)),
            "so_far": coverage(turns, now_solved, lambda turn: _hardness(turn, session)),
            "pool": {"added": len(records), "replies": _replies(records)},
            "work": _integers(swept.work),
            "rollouts": counts,
        }
        if ranks.is_main:
            write_pool(place / POOL, records)
            workbench = session.workbench
            write_template(place, workbench.renderer, workbench.env_maker("train")(turns[0]))
        log.write_json(f"rounds/{place.name}/{COVERAGE}", content)
        if ranks.is_main:
            shutil.rmtree(place / CHUNKS)
    _report(content, swept, session, number, update)
    return Round([record_sample(record) for record in records], _solved(content["rollouts"]))


def _play_round(
    turns: list[Turn], config: "train_sft.Config", session: Session, number: int
) -> Swept:
    """Roll the turns out, chunk by chunk. Of a chunk are kept the records of the chosen
    trajectories and the counts of all."""
    log, selftaught = session.log, config.selftaught
    renderer = session.workbench.renderer
    collector = make_collector(config, session)
    device, max_tokens = session.accelerator.device, config.sft.max_batch_tokens
    embedder = open_embedder(selftaught.embedding, renderer, device, max_tokens)
    num_samples = selftaught.samples_per_turn
    name = f"round {number}"

    def find(groups: list[Group], engine: Engine) -> dict[str, Any]:
        chosen = [
            trajectory
            for group in groups
            for trajectory in _choose(group, config, session, embedder, engine)
        ]
        records = [pool_record(trajectory, renderer, number) for trajectory in chosen]
        return {"kept": records, "counts": rollout_counts(groups)}

    def check(found: list[dict[str, Any]]) -> None:
        counts = add_counts(part["counts"] for part in found)
        if not number:
            _require_success(counts, config)
        num_first = len(counts["successes"])
        if num_first < len(turns):
            log.print(f"{name}: {len(_solved(counts))} of the first {num_first} turns are solved")

    folder = round_folder(config, number) / CHUNKS
    kept = kept_chunks(session.folder, f"rounds/round{number}/{CHUNKS}")
    text = f"{name}: {len(turns)} turns, {num_samples} rollouts of each"
    log.print(f"{text}; it goes on after {kept}" if kept else text)
    with log.work("rollout", f"{name}: rollouts") as show, peers_may_stop():
        return collector.sweep(
            turns,
            find,
            name=name,
            folder=folder,
            num_samples=num_samples,
            update=number,
            check=check,
            show=show,
        )


def _choose(
    group: Group,
    config: "train_sft.Config",
    session: Session,
    embedder: Embedder,
    engine: Engine,
) -> list[Trajectory]:
    """The trajectories of a group that are learned from."""
    turn = group[0].trajectory.turn
    return select(
        [scored.trajectory for scored in group],
        [scored.is_right for scored in group],
        _hardness(turn, session) == "easy",
        config.selftaught,
        turn_key(turn.turn_id) ^ config.seed,
        embedder.embed_with(engine.model),
    )


def _require_success(counts: dict[str, Any], config: "train_sft.Config") -> None:
    """ValueError with advice if no rollout of the first turns is right."""
    if counts["right"]:
        return
    ended = ", ".join(
        f"{name} {count / counts['num']:.0%}" for name, count in counts["endings"].items()
    )
    raise ValueError(
        f"the model got none of the first {len(counts['successes'])} turns right in "
        f"{config.selftaught.samples_per_turn} rollouts of each, so it cannot teach itself yet "
        f"(rollouts ended: {ended}): {ADVICE_TOY if config.data.is_toy else ADVICE}"
    )


def evaluate_round(config: "train_sft.Config", session: Session, number: int, update: int) -> None:
    """Score the model of a round on `selftaught.eval_split`; print, log and keep the scores."""
    log, selftaught = session.log, config.selftaught
    if selftaught.eval_split is None:
        return
    collector = make_collector(config, session)
    title = f"round {number}: {selftaught.eval_split}"
    with log.work("eval", title) as show, peers_may_stop():
        scores_of, counts, _ = collector.evaluate_held_out(selftaught.eval_turns, show)
    row: dict[str, Any] = {"stage": "eval", "update": update, "round": number}
    for split, scores in scores_of.items():
        summary = summarize(scores)
        content = {**summary, "turns": scores_as_rows(scores)}
        log.write_json(f"rounds/round{number}/{split}.json", content)
        total = summary["all"]
        row |= {f"{split}_ex": total["ex"], f"{split}_em": total["em"]}
        log.print(
            f"round {number}: {split} EX {total['ex']:.1f} EM {total['em']:.1f} "
            f"({total['count']} turns)"
        )
    row |= engine_metrics(counts, session.meter, session.ranks, log.secs("eval"))
    log.metrics(row)


def start_weights(config: "train_sft.Config", session: Session, number: int) -> Path | None:
    """The folder of the weights that a round's SFT starts from. None: those of the policy as it
    is. With selftaught.start=base, the first round keeps its weights for the later ones."""
    start = config.selftaught.start
    base = Path(config.run) / "rounds" / "base"
    if start == "base" and number == 0:
        session.save_model_to(base)
        session.accelerator.wait_for_everyone()
    if start == "policy" or number == 0:
        return None
    return base if start == "base" else round_folder(config, 0) / "model"


def _report(
    content: dict[str, Any], swept: Swept, session: Session, number: int, update: int
) -> None:
    """Print a round's coverage and log it, unless the resumed run has logged it before."""
    log, rollouts = session.log, content["rollouts"]
    num_solved, num_turns = content["solved"], content["turns"]
    log.print(
        f"round {number}: solved {num_solved} of {num_turns} turns, "
        f"added {content['pool']['added']} trajectories to the pool"
    )
    for line in coverage_lines(content["so_far"], rollouts):
        log.print(line)
    secs = log.secs("rollout")
    row = {
        "stage": "collect",
        "update": update,
        "round": number,
        "num_turns": num_turns,
        "num_solved": num_solved,
        "pool_added": content["pool"]["added"],
        **coverage_metrics(content["so_far"], rollouts),
        **sweep_metrics(swept, session.meter, session.ranks, secs),
    }
    is_logged = any(one["stage"] == "collect" and one["round"] == number for one in log.rows)
    if not is_logged:
        log.metrics(row)


def _read_round(place: Path) -> dict[str, Any]:
    """What a finished round has kept, empty if it has not come to its end. ValueError that names
    the file that is damaged."""
    if not (place / COVERAGE).is_file():
        return {}
    lines = read_lines(place / POOL)
    records: list[PoolRecord] = [
        parse_json(line, f"{place / POOL}, line {number}") for number, line in enumerate(lines, 1)
    ]
    return {"records": records, "content": read_json(place / COVERAGE)}


def _solved(counts: dict[str, Any]) -> set[str]:
    return {turn_id for turn_id, (num_right, _) in counts["successes"].items() if num_right}


def _hardness(turn: Turn, session: Session) -> str | None:
    return hardness(turn.sql, session.workbench.corpora["train"].databases[turn.db_id].schema)


def _replies(records: list[PoolRecord]) -> dict[str, int]:
    """How many records have so many replies."""
    counts = Counter(str(record["num_replies"]) for record in records)
    return dict(sorted(counts.items()))


def _integers(counts: EngineCounts) -> dict[str, int]:
    return {name: count for name, count in asdict(counts).items() if isinstance(count, int)}
