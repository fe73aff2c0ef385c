"""Diffusion-pretrained text embeddings in JAX: train them, export them, serve them."""

__version__ = "0.1.0"
