"""What models that are trained here can do: each module writes one JSON file under benchmarks/results/quality."""
