"""What to keep, to move away and to compute again between forward and backward, so that a step fits a budget."""
