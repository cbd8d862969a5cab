"""The library behind the programs beside it. A room imports from those before it: data, config, ranks, model, methods,
state, train, pictures, probes."""

import os

# At the end of a parallel loop OpenMP's threads wait for each other by spinning, by default for milliseconds: where
# another process keeps one of two cores busy, a step on a CPU then takes five times as long (benchmarks/README.md).
# Read when torch loads libgomp, so torch must not be imported before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
