"""New tokenizers, learnt from text: byte-level BPE as Llama 3's, SentencePiece's BPE as Llama 1's and 2's."""
