"""The agent as text: protocol, prompts, reply parser, tools, memory, environment. It imports only
`mtsql.sql`."""
