"""Pure losses on tensors."""
