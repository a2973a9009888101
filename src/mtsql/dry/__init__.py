"""--dry_run: every phase of a run in a minute, on a small random model."""
