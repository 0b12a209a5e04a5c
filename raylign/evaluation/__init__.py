"""Judges, metrics and the drift check."""
