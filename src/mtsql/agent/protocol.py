"""The tags of the protocol that a policy and the environment speak."""

TAGS: tuple[str, ...] = (
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
"""Each is one token of the embedded model's tokenizer, with its id in this order."""
