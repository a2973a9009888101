"""The embedded world of databases and dialogues, written as ordinary SParC files."""
