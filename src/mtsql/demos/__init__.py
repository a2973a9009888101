"""Demonstrations made from a turn's gold SQL, played and checked in the real environment."""
