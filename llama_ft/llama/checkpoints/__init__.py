"""Checkpoints in: HF safetensors, Meta's .pth, GGUF and llama2.c, each checked before a value is read."""
