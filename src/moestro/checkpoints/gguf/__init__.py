"""GGUF, llama.cpp's format: read as one more source of tensors, and written."""
