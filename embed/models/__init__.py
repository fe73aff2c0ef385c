"""The encoder and what turns its hidden states into embeddings."""
