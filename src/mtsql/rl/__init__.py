"""Reinforcement learning: rollouts, rewards, advantages, curriculum, metrics of an update."""
