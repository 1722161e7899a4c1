"""`python -m harness.bench.gpu`: proves the GPU path in ten minutes."""
