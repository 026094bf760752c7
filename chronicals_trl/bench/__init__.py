"""Benchmarks: `chronicals-trl bench ops` times the fused ops, `chronicals-trl bench head` the head with its loss, each
against eager torch, torch.compile and other libraries.

    timing.py        one callable on a GPU, forward or backward, without the host; on the host alone; copy bandwidth
    common.py        what both benchmarks share
    ops.py           what is timed: ops, shapes, the sides that compete, and how many bytes each op has to move
    run.py           checks every side against fp64, times it, gathers rows
    verdict.py       the targets, met or missed
    report.py        table, JSON and plot
    head.py, head_check.py, head_run.py, head_verdict.py, head_report.py: the same for the head
    command.py       the command line

Nothing of the rest of the package imports this one.
"""
