"""Text of sources for tokenizers: to train them on, and to measure them on."""
