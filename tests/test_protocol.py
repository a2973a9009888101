"""The tags and their order, which decide the ids that the embedded tokenizer gives them."""

from mtsql.agent.protocol import TAGS


def test_the_tags_and_their_order():
    assert TAGS == (
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<exec_verify>",
        "</exec_verify>",
        "<memory_verify>",
        "</memory_verify>",
        "<answer_sql>",
        "</answer_sql>",
    )
