"""Hugging Face, SentencePiece and tiktoken tokenizers behind one door."""
