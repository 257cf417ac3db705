"""Train the adapter: the loop, optimizer, schedule, checkpoints, metrics and memory estimate."""
