"""The encoder, and the functions that turn its hidden states into embeddings."""
