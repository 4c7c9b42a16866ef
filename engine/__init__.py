"""Training, labelling, inference and evaluation: what the scripts call."""
