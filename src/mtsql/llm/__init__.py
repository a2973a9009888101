"""Tokens and tensors: rendering, model, generation engine, packing, log-probs, losses. Knows no SQL."""
