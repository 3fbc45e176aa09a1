"""Training: losses, schedule, state, step and loop."""
