"""Use exported models: embeddings, late chunking, search. Needs neither TensorFlow nor training code.

encoder = embed.inference.load("runs/quickstart/export/embed")
vectors = encoder.encode(["def add(a, b): return a + b"], precision="int8")
"""

from embed.inference.encoder import Encoder, load
from embed.inference.index import Index
from embed.inference.late_interaction import maxsim
from embed.inference.precision import PRECISIONS, quantize
from embed.inference.ranking import search
from embed.inference.scores import similarity

__all__ = ["PRECISIONS", "Encoder", "Index", "load", "maxsim", "quantize", "search", "similarity"]
