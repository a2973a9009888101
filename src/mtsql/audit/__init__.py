"""Look at a data set before training on it: what `mtsql audit` does (commands/audit.py)."""
