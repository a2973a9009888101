"""Learning: samples are packed, scored and turned into one gradient."""
