"""The agent as text: prompts, reply parser, tools, memory, environment. Imports only
`mtsql.sql`."""
