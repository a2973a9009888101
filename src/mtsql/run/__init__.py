"""What any training script needs: flags, ranks, logs, checkpoints. Nothing here knows SQL."""
