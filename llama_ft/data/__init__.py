"""Rows -> conversations -> token ids and labels -> micro-batches."""
