"""Look at a data set before training on it. `python -m mtsql.audit --help` (__main__.py)."""
