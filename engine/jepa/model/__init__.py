"""The vision transformers, and which of their rows a step computes."""
