"""What distillation gains, by detector and method: `python -m benchmarks.study`."""
