"""Decides and judges: which parameters a study may choose, which to try next, and which results are best.

Nothing here imports torch, ray or the orchestrator, and nothing touches a file: parameters and results come in as plain
data and numpy arrays, and decisions go out as plain data.
"""
