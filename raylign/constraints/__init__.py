"""Safety constraints as functions: what a cost does to rewards and advantages, the multiplier, and the violations."""
