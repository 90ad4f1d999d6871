"""GGUF files of a run: written by llama.cpp's own tools, read back, and proven like everything else."""
