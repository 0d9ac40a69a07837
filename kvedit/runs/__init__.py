"""Runs: the command line, the pipeline that Hydra builds, the benchmark. Nobody imports it."""
