"""Speed measured against references, on random checkpoints: `python -m benchmarks.prefill`, `python -m benchmarks.decode`."""
