"""Training steps as state transitions."""
