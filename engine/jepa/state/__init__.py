"""A run on disk: checkpoints, and other people's formats."""
