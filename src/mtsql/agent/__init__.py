"""The agent as text: protocol, prompts, reply parser, tools, memory, environment. This room imports
only `mtsql.sql`."""
