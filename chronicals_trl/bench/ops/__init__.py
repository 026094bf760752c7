"""The fused ops against eager torch, torch.compile and other libraries: what is timed, how, and the targets."""
