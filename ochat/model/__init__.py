"""The Llama family over packed tokens, and its Hugging Face files."""
