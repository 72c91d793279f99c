"""Side-by-side microbenchmarks of the operators: ``python -m benchmarks`` or ``tta bench``."""
