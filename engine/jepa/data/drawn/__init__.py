"""Tiny drawn sets in the layouts of sets that cannot be shipped: one layout, one file."""
