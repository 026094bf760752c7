"""Attention within packed documents: each back end, and what it is called by. Cases, runs, table."""
