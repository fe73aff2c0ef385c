"""Sources, seqio tasks and the prepared store. Only python_docs, tasks and prepare import TensorFlow, seqio and gin."""
