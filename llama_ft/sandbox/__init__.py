"""Walls round programs that nobody has read: each in a process that computes and does nothing else."""
