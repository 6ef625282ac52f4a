"""The training engine: the four passes, the step, the run around it and what it leaves on disk."""
