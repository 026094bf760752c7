"""Whole trainings: us and every peer on the same documents, each in a process of its own.

cases.py shapes, documents, protocols, sides; run.py starts a process for each side and gathers rows; worker.py such a
process; sides.py, peers.py how each side trains; meter.py, count.py what is measured; models.py, attention.py,
compile.py the model, a peer's attention, the bare loop; figures.py what follows from the measurements; ablation.py our
parts one after the other; floor*.py the least that a step of ours takes; verdict.py which rows are valid, and targets;
report.py, command.py.
"""
