"""Synthetic queries for documents, by a language model: the work of `embed synthesize` (docs/synthesize.md)."""

from embed.preparation.synthesis.endpoint import Endpoint
from embed.preparation.synthesis.output import Document, Output, check_texts, is_output
from embed.preparation.synthesis.report import Report
from embed.preparation.synthesis.synthesize import Synthesis

__all__ = ["Document", "Endpoint", "Output", "Report", "Synthesis", "check_texts", "is_output"]
