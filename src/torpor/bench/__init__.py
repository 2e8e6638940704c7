"""Benchmarks: scenarios that emit series, compared within one run, and the demonstration."""
