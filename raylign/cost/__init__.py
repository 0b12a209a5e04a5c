"""What a run costs: device-seconds, tokens, FLOPs, bytes."""
