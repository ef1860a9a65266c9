"""Side by side with what else there is: ``python -m benchmarks zero --help``."""
