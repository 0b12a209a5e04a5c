"""Ray Tune sweeps over raylign runs."""
