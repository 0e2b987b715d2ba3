"""One epoch and what surrounds it: plan, collection, updates, checkpoints, progress, logs, memory."""
