"""What models cost: operations, memory and time, measured side by side."""
