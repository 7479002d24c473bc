"""What is done with checkpoints after training."""
