"""Benchmarks, `chronicals-trl bench NAME`, a folder each. Nothing of the rest of the package imports this one.

    ops/         the fused ops against eager torch, torch.compile and other libraries
    head/        the head with its loss, likewise
    attention/   attention within packed documents
    lora/        one decoder layer with LoRA against PEFT, torch.compile and Unsloth
    sft/         whole trainings: us and every peer, each in a process of its own
    timing.py    one callable on a GPU, forward or backward, without the host; on the host alone; copy bandwidth
    process.py   a side in a process of its own
    common.py    what runs share; verdict.py: how a target is judged; report.py: table, JSON and plot; command.py

In a folder: cases.py what is measured, and who competes; run.py gathers rows; verdict.py the targets; report.py.
"""
