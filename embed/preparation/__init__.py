"""Data preparation: sources, seqio tasks and `prepare`. Only this package imports TensorFlow, seqio and gin."""
