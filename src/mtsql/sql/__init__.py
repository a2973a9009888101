"""Databases, dialogues and the sandbox that runs SQL. Imports neither torch nor transformers."""
