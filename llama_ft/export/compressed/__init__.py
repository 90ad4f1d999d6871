"""Compressed checkpoints of a run for vLLM: made by llm-compressor in an environment of its own, read back, proven."""
