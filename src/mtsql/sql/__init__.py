"""Databases, dialogues, SQL text and the metrics that judge it. Imports neither torch nor
transformers."""
