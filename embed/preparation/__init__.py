"""What makes the data: sources, seqio tasks, `prepare`. TensorFlow, seqio and gin are imported in this room alone."""
