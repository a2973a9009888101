"""What prompts share stands first in them, token for token, so that the cache can share it."""

from os.path import commonprefix

import pytest

from helpers.chat_models import KINDS, stand_in
from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.protocol import TAGS
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Column, Database, Schema, Table, schema_text

COLUMNS = (Column("name", "text"), Column("birth year", "integer"))
SCHEMA = Schema("shop", (Table("singer", COLUMNS), Table("concert", COLUMNS)))
FIRST = ("Who sings ?", "SELECT name FROM singer")
SECOND = ("How many are there ?", "SELECT count(*) FROM singer")
TURNS = [
    Turn("dev:0:0", 0, "shop", FIRST[0], FIRST[1]),
    Turn("dev:0:1", 1, "shop", SECOND[0], SECOND[1], (FIRST,)),
    Turn("dev:0:2", 2, "shop", "Only the young ones ?", "SELECT 1", (FIRST, SECOND)),
    Turn("dev:1:0", 0, "shop", "Which concerts ?", "SELECT 1", evidence="a concert is a show"),
]
LONGEST_TOKEN = 16  # characters; a token at the border may hold some of what differs


def renderer_of(kind: str) -> Renderer:
    """A stand-in for a model's tokenizer, or one that merges letters."""
    if kind != "merging":
        return Renderer(stand_in(kind))
    texts = [f"\n\nEarlier turns:\nQuestion 1: {FIRST[0]}\nSQL 1: {FIRST[1]}\n\nQuestion: "]
    return Renderer(train_tokenizer(texts * 50, 420, TAGS))


@pytest.mark.parametrize("style", ["full", "brief"])
@pytest.mark.parametrize("kind", [*KINDS, "merging"])
def test_turns_share_their_beginning_up_to_what_differs(kind, style, tmp_path):
    renderer = renderer_of(kind)
    database = Database(SCHEMA, tmp_path / "shop.sqlite")
    prompts = [
        renderer.render_prompt(*SqlEnv(turn, database, EnvConfig(), style).reset())
        for turn in TURNS
    ]

    def shared(*turns: int) -> str:
        """The text that these prompts share. It ends where the texts begin to differ."""
        ids = commonprefix([prompts[turn] for turn in turns])
        text = renderer.text(ids)
        whole = commonprefix([renderer.text(prompts[turn]) for turn in turns])
        assert len(whole) - len(text) <= LONGEST_TOKEN
        return text

    schema = schema_text(SCHEMA) if style == "full" else 'concert: name "birth year"'
    for turn in (0, 1, 2):
        assert schema in shared(turn, 3)
    if style == "full":
        assert "You answer questions" in shared(0, 1, 2, 3)
    assert FIRST[1] in shared(1, 2)  # the earlier turn that both have
