"""What a run is: one validated YAML."""
