"""Training: configuration, schedules, logs, checkpoints and the loops that use them."""
