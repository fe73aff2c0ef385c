"""What training reads: the store, the curriculum, the loaders. NumPy and TensorStore, no TensorFlow."""
