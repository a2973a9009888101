"""The page that `mtsql view` writes: one HTML file, with the trajectories of one or two runs."""
