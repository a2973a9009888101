"""Whether an SQL answer is right: the official metrics, the reward's match and its guard."""
