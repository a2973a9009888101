"""Reinforcement learning in plain Python over `agent` and `llm`: rollouts, rewards, advantages, curriculum."""
