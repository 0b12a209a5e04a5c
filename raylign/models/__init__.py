"""Loading transformers models and the one packed forward."""
