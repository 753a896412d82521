"""Text as documents, tokens on disk, and the windows that training reads."""
