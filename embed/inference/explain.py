"""What each token of a chunk contributes to its score for a query, as numbers, a page or a picture (docs/long.md)."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embed.inference.chunkers import Chunker
from embed.inference.encoder import Encoder
from embed.inference.scores import similarity

COLUMNS = 100  # characters of a line of the picture


class Explained(NamedTuple):
    """A chunk of a text and its score for a query."""

    start: int  # character offsets in the text
    end: int
    score: float  # the cosine of the float32 vectors
    offsets: np.ndarray  # int32 [T, 2], of its tokens in the text
    contributions: np.ndarray  # float32 [T], their sum is the score


def explain(
    encoder: Encoder, query: str, text: str, chunker: Chunker | None = None, *, window: int | None = None
) -> list[Explained]:
    """The chunks of a text in order, each with what its tokens contribute to its score; the whole text by default.

    The vector of a chunk is the mean of the last hidden states h of its T tokens, so its cosine with the query q is the
    sum over its tokens of q · h / (T |q| |mean|): positive where a token moves the chunk towards the query. Each h has
    seen the whole text, so a token also stands for its context. Of a model that pools the last token, only this one
    contributes. `tanh` and int8 are left out. `window` is as in `encode_long`.
    """
    (fitted,), window = encoder.fit_long([text], chunker or (lambda text: [(0, len(text))]), window, ["the text"])
    states = encoder.hidden_states([fitted.segment], window=window)
    offsets = [encoder.tokenizer.offsets(text[a:b]) + a for a, b in fitted.pieces]
    (of_query,) = encoder.hidden_states(encoder.fit_texts([query], names=["the query"])[0])
    asked = _pool(of_query, encoder.pooling)
    result = []
    for (start, end), (first, stop) in zip(fitted.chunks, fitted.of_chunk, strict=True):
        hidden = np.concatenate(states[first:stop])
        if not len(hidden):  # no token: a zero vector
            result.append(Explained(start, end, 0.0, np.zeros((0, 2), np.int32), np.zeros(0, np.float32)))
            continue
        if encoder.pooling == "last":
            weights = np.zeros(len(hidden), np.float32)
            weights[-1] = 1
        else:
            weights = np.full(len(hidden), 1 / len(hidden), np.float32)
        pooled = _pool(hidden, encoder.pooling)
        score = float(similarity(asked[None], pooled[None])[0, 0])
        norms = max(np.linalg.norm(asked) * np.linalg.norm(pooled), np.finfo(np.float32).tiny)
        result.append(
            Explained(start, end, score, np.concatenate(offsets[first:stop]), hidden @ asked * weights / norms)
        )
    return result


def _pool(hidden: np.ndarray, pooling: str) -> np.ndarray:
    return hidden[-1] if pooling == "last" else hidden.mean(0)


def page(query: str, text: str, chunks: Sequence[Explained]) -> str:
    """A heat map as one HTML page: green tokens raise the score of their chunk, red ones lower it.

    The token that contributes most has the full color, in every chunk: longer ones have smaller contributions.
    """
    parts = []
    for chunk in chunks:
        spans, reached, largest = [], chunk.start, _largest(chunk)
        for (start, end), value in zip(chunk.offsets.tolist(), chunk.contributions.tolist()):
            start = max(start, reached)  # tokens may share a character
            spans.append(html.escape(text[reached:start]))
            color = "0,140,70" if value > 0 else "200,40,40"
            style = f"background:rgba({color},{abs(value) / largest:.3f})"
            spans.append(f'<span title="{value:+.4f}" style="{style}">{html.escape(text[start:end])}</span>')
            reached = max(reached, end)
        spans.append(html.escape(text[reached : chunk.end]))
        parts.append(f"<h2>{chunk.score:.3f}, characters {chunk.start}–{chunk.end}</h2>\n<pre>{''.join(spans)}</pre>")
    title = html.escape(query)
    style = "body{font-family:sans-serif;max-width:60em;margin:auto}pre{white-space:pre-wrap}h2{font-size:1em}"
    return (
        f'<!doctype html>\n<html><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>\n'
        f"<body><h1>{title}</h1>\n<p>What each token contributes to the cosine of its chunk: green raises it, red "
        f"lowers it.</p>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def picture(query: str, text: str, chunks: Sequence[Explained], file) -> None:
    """The same heat map as a PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    cells, line = [], 0
    for chunk in chunks:
        cells.append((line, 0, f"{chunk.score:.3f}, characters {chunk.start}–{chunk.end}", 0.0))
        line, column, largest = line + 1, 0, _largest(chunk)
        for (start, end), value in zip(chunk.offsets.tolist(), chunk.contributions.tolist()):
            for k, part in enumerate(text[start:end].split("\n")):
                if column and (k or column + len(part) > COLUMNS):
                    line, column = line + 1, 0
                cells.append((line, column, part, value / largest))
                column += len(part)
        line += 2
    width, height = 0.09 * COLUMNS, 0.2 * (line + 2)  # inches
    figure = Figure((width, height), dpi=150)
    axes = figure.add_axes((0.01, 0, 0.98, 1), xlim=(0, COLUMNS), ylim=(line, -2))
    axes.axis("off")
    axes.text(0, -1, query, weight="bold", parse_math=False)  # dollar signs would begin formulas
    for row, column, part, value in cells:
        color = (0, 0.55, 0.27) if value > 0 else (0.78, 0.16, 0.16)
        how = dict(family="monospace", size=9, va="center", parse_math=False)
        if value:
            patch = dict(facecolor=(*color, abs(value)), edgecolor="none")
            axes.add_patch(Rectangle((column, row - 0.5), len(part), 1, **patch))
        axes.text(column, row, part, **how)
    figure.savefig(file, format="png")


def _largest(chunk: Explained) -> float:
    return float(np.abs(chunk.contributions).max(initial=np.finfo(np.float32).tiny))
