"""Plots, HTML report and model card."""
