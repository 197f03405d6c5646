"""Checkpoints of other formats as GGUF files, and GGUF files in parts: what is written, and that it is whole or not."""
