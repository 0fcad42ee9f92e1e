"""Speed and memory as ratios of interleaved pairs in one process: `python -m benchmarks.<name>`."""
