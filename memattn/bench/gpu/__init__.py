"""One command for a card that can be had for minutes: stages in order of worth, nothing lost.

``python -m memattn.bench.gpu --out DIR`` checks every operator against float64, measures the bars
beside their peers, runs the CUDA tests and times other tile configurations, each stage within its
own time. Every result is written as it comes. ``--dry`` runs the same script on a CPU.
"""
