"""Plans a run before it starts: its memory on each GPU, and its hours."""
