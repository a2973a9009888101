"""The agent of a conversation: the real engine and environment, told what to sample."""

from contextlib import closing

import pytest

from helpers.episodes import answer, call, singers
from helpers.models import save_embedded
from helpers.told_engine import told_agent
from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.reply import Verdict, format_reply
from mtsql.chat.agent import Agent, AgentConfig
from mtsql.chat.conversation import Conversation
from mtsql.chat.events import Did, Ended, Played, Reading, Sampled
from mtsql.chat.session import Session
from mtsql.engine.engine import Engine
from mtsql.engine.sampling import SamplingConfig
from mtsql.model.policy import ModelConfig, load_policy
from mtsql.rl.rollout import rollout

COUNT = "SELECT count(*) FROM singer"
NAMES = "SELECT name FROM singer"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_embedded(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def talk(model, tmp_path, monkeypatch):
    """Opens sessions with these episodes, and closes them."""
    opened = []
    database = singers(tmp_path / "shop.sqlite")

    def open_session(*episodes, **options):
        opened.append(told_agent(monkeypatch, model, database, *episodes, **options))
        return Session(opened[-1], Conversation(database, EnvConfig()))

    yield open_session
    for agent in opened:
        agent.close()


def ended(events):
    """The turn with which a question ends."""
    return list(events)[-1].turn


def test_the_text_streams_before_its_steps(talk):
    episode = [call(COUNT, think="é 漢 🙂 count"), answer(COUNT, ran=Verdict.PASS)]
    events = list(talk(episode).ask("how many singers ?" * 60))  # it is read in several steps
    pieces = [event for event in events if isinstance(event, Sampled)]
    assert "".join(piece.text for piece in pieces) == "".join(map(format_reply, episode))
    assert "\ufffd" not in "".join(piece.text for piece in pieces) and len(pieces) > 20
    names = [event.step.name for event in events if isinstance(event, Did)]
    assert names == ["think", "propose", "execute", "verify", "answer"]
    first_step = next(i for i, event in enumerate(events) if isinstance(event, Did))
    num_before = sum(isinstance(event, Sampled) for event in events[:first_step])
    assert 10 < num_before < len(pieces)
    assert isinstance(events[0], Reading) and 0 < events[0].num_done < events[0].num_all
    assert isinstance(events[-1], Ended) and events[-1].turn.result.rows == ((2,),)


def test_the_tokens_are_those_of_a_rollout_without_a_listener(model, tmp_path):
    """The real engine, drafts included, and a model that samples at random."""
    database = singers(tmp_path / "shop.sqlite")
    sampling = SamplingConfig(temperature=1.0, max_reply_tokens=40, max_trajectory_tokens=60)
    config = AgentConfig(str(model), EnvConfig(), "brief", 4000, sampling, 7)
    turn = Conversation(database, EnvConfig()).next_turn("how many ?")
    with Agent(config, database) as agent:
        events = list(agent.ask(turn))
        again = list(agent.ask(turn))
        renderer = agent.renderer
    [played] = rollout(
        Engine(load_policy(ModelConfig(path=str(model))).eval(), renderer.stop_ids, sampling),
        renderer,
        [turn],
        lambda turn: SqlEnv(turn, database, EnvConfig(), "brief"),
        num_samples=1,
        seed=7,
        update=0,
        max_prompt_tokens=4000,
        judge=lambda trajectory: trajectory,
    )
    start, end = played.reply_spans[0]
    text = renderer.decode(played.ids[start:end])
    assert "".join(one.text for one in events if isinstance(one, Sampled)) == text
    assert isinstance(events[-1], Played) and events[-1].num_sampled == played.num_sampled > 1
    assert [one for one in again if isinstance(one, Sampled)] == [
        one for one in events if isinstance(one, Sampled)
    ]


def test_a_caller_who_leaves_stops_the_generation_and_keeps_the_conversation(talk):
    session = talk([answer(COUNT)], [call(NAMES, think="so " * 2000)], [answer(NAMES)])
    first = ended(session.ask("how many ?"))
    with closing(session.ask("who ?")) as events:
        seen = [next(events) for _ in range(12)]
    assert isinstance(seen[-1], Sampled)
    assert session.conversation.turns == (first,)
    assert ended(session.ask("who ?")).sql == NAMES  # the engine goes on


def test_another_thread_stops_the_generation(talk):
    session = talk([call(NAMES, think="so " * 2000)])
    with pytest.raises(ValueError, match="stopped"):
        for event in session.ask("who ?"):
            if isinstance(event, Sampled):
                session.agent.stop()
    assert session.conversation.is_empty


def test_budgets_end_an_episode_in_words(talk):
    session = talk([call(NAMES, think="so " * 200)], max_reply_tokens=20)
    turn = ended(session.ask("who ?"))
    assert turn.ending == "a reply reached sampling.max_reply_tokens"
    assert turn.steps[-1].name == "truncated" and turn.steps[-1].text.startswith("<think>")
    turn = ended(session.ask("who " * 5000))
    assert "max_prompt_tokens is 4000" in turn.ending and not turn.steps
