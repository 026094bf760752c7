"""One decoder layer with LoRA against PEFT, torch.compile and Unsloth.

cases.py what is measured; layer.py, sides.py each side's layer; check.py against fp64; timing.py, measure.py; run.py,
worker.py (Unsloth's process); verdict.py, report.py, command.py.
"""
