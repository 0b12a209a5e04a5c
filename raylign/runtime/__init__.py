"""The only layer that imports ray, vllm or wandb."""
