"""The head with its loss against other libraries: cases, checks against fp64, runs, targets, table."""
