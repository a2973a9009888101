"""Figures of finished and of running runs: what `mtsql plots` draws."""
