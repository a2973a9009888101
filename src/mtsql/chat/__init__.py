"""A conversation over any SQLite file, with the environment, prompts and engine of training."""
