"""Reading, validating, tokenising and packing preference data."""
