"""Dense labels: files, geometry, targets, mixing, loss."""
