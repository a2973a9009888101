"""The policy: its decoder, its weights, and how text becomes ids and back."""
