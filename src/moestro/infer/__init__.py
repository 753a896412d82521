"""Using a trained model: choosing the next token, and streaming text from a prompt."""
