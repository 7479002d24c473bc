"""What a run shows and leaves behind: progress, logs, tables."""
