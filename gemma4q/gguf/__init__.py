"""Bytes on disk: the GGUF container read and written, and the quantisation formats in numpy."""
