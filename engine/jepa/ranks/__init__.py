"""Who takes part in a run, on which device, and when it stops."""
