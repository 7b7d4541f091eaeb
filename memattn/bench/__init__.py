"""Benchmarks: speed and memory of the operators, compared with peers and the roofline."""
