"""The benchmark suite behind `genrep bench`; installed as `genrep_fast.benchmarks`."""
