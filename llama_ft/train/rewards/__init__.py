"""What answers are worth: reward models, built-in functions, and the user's own, bounded and named when they fail."""
