"""One command that checks and measures the kernels on a GPU that is available for minutes only.

``python -m memattn.bench.gpu --out DIR`` checks every operator against float64, measures the bars
and their peers, runs the CUDA tests and times other tile configurations. The most useful stages
come first, and each has its own time limit. Each result is written at once, so an interrupted run
keeps what it has. ``--dry`` runs the same stages on a CPU.
"""
