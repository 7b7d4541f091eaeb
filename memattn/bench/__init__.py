"""Benchmarks: operators beside their peers, held against the roofs of the machine."""
