"""Generation: rows of tokens, a paged cache and the scheduler that fills it."""
