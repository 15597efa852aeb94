"""A training run: options, trainer, checkpoints, sharding, fine-tuning and its report."""
