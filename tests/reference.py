"""Plain float64 NumPy versions of what the library computes, written from the formulas with one loop per sum.

Every loss also takes complex input and is analytic in it, so `gradient` is exact to the last digits: the derivative
along x_k is Im f(x + ih e_k) / h without any cancellation (the complex step). Decisions (margins, masks) use real
parts.
"""

import numpy as np


def gradient(function, arrays):
    """The gradient of a real scalar function of several arrays, by complex steps: one array per input."""
    step = 1e-40
    out = []
    for position, array in enumerate(arrays):
        grad = np.zeros(array.shape)
        for index in np.ndindex(*array.shape):
            moved = [np.array(a, np.complex128) for a in arrays]
            moved[position][index] += 1j * step
            grad[index] = np.imag(function(*moved)) / step
        out.append(grad)
    return out


def cosines(a, b):
    """[n, m]: <a_i, b_j> / (‖a_i‖ ‖b_j‖); 0 if one of them is a zero vector."""

    def normalized(x):
        square = np.sum(x * x, -1, keepdims=True)
        empty = np.real(square) <= 0
        return np.where(empty, 0, x) / np.sqrt(np.where(empty, 1, square))

    return normalized(a) @ normalized(b).T


def share(ids, i, j):
    """Whether two examples have equal content; False without ids."""
    return ids is not None and ids[i] == ids[j]


# --- contrastive losses -----------------------------------------------------------------------------------------


def pair_loss(
    queries,
    documents,
    *,
    temperature,
    margin=0.1,
    query_ids=None,
    document_ids=None,
    valid=None,
    query_negatives=True,
):
    to_documents, to_queries = cosines(queries, documents), cosines(queries, queries)
    total, count = 0.0, 0
    for i in range(len(queries)):
        if valid is not None and not valid[i]:
            continue
        positive = to_documents[i, i]
        denominator = np.exp(positive / temperature)
        for j in range(len(queries)):
            if j == i or (valid is not None and not valid[j]):
                continue
            if share(query_ids, i, j) or share(document_ids, i, j):
                continue
            for score in (to_documents[i, j], to_queries[i, j])[: 1 + query_negatives]:
                if margin is None or np.real(score) <= np.real(positive) + margin:
                    denominator += np.exp(score / temperature)
        total -= np.log(np.exp(positive / temperature) / denominator)
        count += 1
    return total / max(count, 1)


def triplet_loss(
    queries,
    documents,
    negatives,
    *,
    temperature,
    query_ids=None,
    document_ids=None,
    negative_ids=None,
    valid=None,
    negative_valid=None,
):
    n, num_negatives, dim = negatives.shape
    to_documents = cosines(queries, documents)
    to_negatives = cosines(queries, negatives.reshape(-1, dim)).reshape(n, n, num_negatives)
    total, count = 0.0, 0
    for i in range(n):
        if valid is not None and not valid[i]:
            continue
        positive = to_documents[i, i]
        denominator = np.exp(positive / temperature)
        for j in range(n):
            if valid is not None and not valid[j]:
                continue
            if j != i and not share(query_ids, i, j) and not share(document_ids, i, j):
                denominator += np.exp(to_documents[i, j] / temperature)
            for k in range(num_negatives):
                if negative_valid is not None and not negative_valid[j][k]:
                    continue
                if document_ids is not None and negative_ids is not None and negative_ids[j][k] == document_ids[i]:
                    continue
                denominator += np.exp(to_negatives[i, j, k] / temperature)
        total -= np.log(np.exp(positive / temperature) / denominator)
        count += 1
    return total / max(count, 1)


def contextual_loss(
    queries,
    chunks,
    documents,
    *,
    positive,
    chunk_document,
    temperature,
    beta,
    alpha=0.2,
    margin=0.1,
    query_ids=None,
    chunk_ids=None,
    valid=None,
    chunk_valid=None,
    query_negatives=True,
):
    def is_valid_chunk(c):
        return chunk_valid is None or chunk_valid[c]

    examples = [
        i for i in range(len(queries)) if (valid is None or valid[i]) and is_valid_chunk(positive[i])
    ]  # an example is a query with its positive chunk
    if not examples:
        return 0.0

    def same_example(i, j):
        return share(query_ids, i, j) or share(chunk_ids, positive[i], positive[j])

    to_chunks, to_documents, to_queries = (cosines(queries, x) for x in (chunks, documents, queries))
    seq = batch = global_ = 0.0
    for i in examples:
        p = positive[i]
        score = to_chunks[i, p]
        in_document = in_batch = np.exp(score / temperature)
        for c in range(len(chunks)):
            if c == p or not is_valid_chunk(c) or share(chunk_ids, p, c):
                continue
            if any(positive[j] == c and same_example(i, j) for j in examples):
                continue
            term = np.exp(to_chunks[i, c] / temperature)
            in_batch = in_batch + term
            if chunk_document[c] == chunk_document[p]:
                in_document = in_document + term
        seq -= np.log(np.exp(score / temperature) / in_document)
        batch -= np.log(np.exp(score / temperature) / in_batch)

        score = to_documents[i, i]
        denominator = np.exp(score / temperature)
        for j in examples:
            if j == i or same_example(i, j):
                continue
            same_document = chunk_document[positive[i]] == chunk_document[positive[j]]
            for s, left_out in ((to_documents[i, j], same_document), (to_queries[i, j], not query_negatives)):
                if not left_out and (margin is None or np.real(s) <= np.real(score) + margin):
                    denominator = denominator + np.exp(s / temperature)
        global_ -= np.log(np.exp(score / temperature) / denominator)
    local = alpha * seq + (1 - alpha) * batch
    return (beta * global_ + (1 - beta) * local) / len(examples)


def spread_out(vectors, *, ids=None, valid=None):
    scores = cosines(vectors, vectors)
    pairs = [
        scores[i, j]
        for i in range(len(vectors))
        for j in range(len(vectors))
        if i != j and not share(ids, i, j) and (valid is None or (valid[i] and valid[j]))
    ]
    first, second = (sum(s**power for s in pairs) / max(len(pairs), 1) for power in (1, 2))
    excess = second - 1 / vectors.shape[1]
    return first**2 + (excess if np.real(excess) > 0 else 0)


# --- distillation -----------------------------------------------------------------------------------------------


def cosine_loss(student, teacher, *, valid=None):
    rows = [i for i in range(len(student)) if valid is None or valid[i]]
    return sum(1 - cosines(student[i : i + 1], teacher[i : i + 1])[0, 0] for i in rows) / max(len(rows), 1)


def squared_error(student, teacher, *, valid=None):
    rows = [i for i in range(len(student)) if valid is None or valid[i]]
    total = sum((student[i, d] - teacher[i, d]) ** 2 for i in rows for d in range(student.shape[1]))
    return total / max(len(rows) * student.shape[1], 1)


def similarity_kl(student, teacher, *, temperature, ids=None, valid=None):
    by_student, by_teacher = cosines(student, student), cosines(teacher, teacher)
    total, count = 0.0, 0
    for i in range(len(student)):
        others = [
            j
            for j in range(len(student))
            if j != i and not share(ids, i, j) and (valid is None or (valid[i] and valid[j]))
        ]
        if not others:
            continue
        q = np.exp(np.array([by_student[i, j] for j in others]) / temperature)
        p = np.exp(np.array([by_teacher[i, j] for j in others]) / temperature)
        p, q = p / p.sum(), q / q.sum()
        total += sum(a * np.log(a / b) for a, b in zip(p, q))
        count += 1
    return total / max(count, 1)


# --- late interaction -------------------------------------------------------------------------------------------


def maxsim(queries, query_valid, documents, document_valid):
    scores = np.zeros((len(queries), len(documents)), np.result_type(queries, documents))
    for i in range(len(queries)):
        for j in range(len(documents)):
            tokens = cosines(queries[i][query_valid[i]], documents[j][document_valid[j]])
            for row in tokens if tokens.shape[1] else []:
                scores[i, j] += row[np.argmax(np.real(row))]
    return scores


def late_interaction_loss(
    queries, documents, *, query_valid, document_valid, temperature, query_ids=None, document_ids=None, valid=None
):
    scores = maxsim(queries, query_valid, documents, document_valid) / temperature
    total, count = 0.0, 0
    for i in range(len(queries)):
        if valid is not None and not valid[i]:
            continue
        denominator = np.exp(scores[i, i])
        for j in range(len(queries)):
            if j == i or (valid is not None and not valid[j]):
                continue
            if not share(query_ids, i, j) and not share(document_ids, i, j):
                denominator += np.exp(scores[i, j])
        total -= np.log(np.exp(scores[i, i]) / denominator)
        count += 1
    return total / max(count, 1)


# --- masked diffusion -------------------------------------------------------------------------------------------


def elbo_loss(token_nll, masked, t, valid):
    total = 0.0
    for row in range(len(t)):
        for i in range(token_nll.shape[1]):
            if masked[row, i]:
                total = total + token_nll[row, i] / t[row]
    return total / max(np.sum(valid), 1)


def token_nll(hidden, embedding, targets):
    """-log softmax(hidden @ embeddingᵀ)[target], [R, L]."""
    logits = hidden @ embedding.T
    normalizer = np.log(np.sum(np.exp(logits), -1))
    return normalizer - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


# --- the encoder ------------------------------------------------------------------------------------------------


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def rope(x, position, theta):
    """One head at one position: dimension j and dimension j + d/2 are one complex number, rotated by p · θ^(-2j/d)."""
    half = len(x) // 2
    rotated = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([rotated.real, rotated.imag])


def attention(query, key, value, segment_ids, causal=False):
    """[L, H, d], [L, K, d], [L, K, d] of one row; head h uses key head h // (H / K)."""
    length, heads, dim = query.shape
    out = np.zeros((length, heads, dim))
    for h in range(heads):
        kv = h // (heads // key.shape[1])
        for i in range(length):
            visible = [j for j in range(i + 1 if causal else length) if segment_ids[j] == segment_ids[i]]
            weights = np.exp([query[i, h] @ key[j, kv] / np.sqrt(dim) for j in visible])
            out[i, h] = (weights / weights.sum()) @ value[visible, kv]
    return out


def encoder(config, params, tokens, segment_ids, positions):
    """Qwen3, with the causal mask only if config.causal, for one row: token ids [L] to hidden states [L, D]."""
    eps, x = config.norm_eps, np.asarray(params["embedding"], np.float64)[tokens]
    for n in range(config.num_layers):
        w = {name: np.asarray(stacked[n], np.float64) for name, stacked in params["layers"].items()}
        y = rms_norm(x, w["attention_norm"], eps)
        q, k, v = (np.tensordot(y, w[name], 1) for name in ("query", "key", "value"))  # L H d
        q, k = rms_norm(q, w["query_norm"], eps), rms_norm(k, w["key_norm"], eps)
        q, k = (
            np.stack([[rope(head, p, config.rope_theta) for head in heads] for heads, p in zip(z, positions)])
            for z in (q, k)
        )
        x = x + np.tensordot(attention(q, k, v, segment_ids, config.causal), w["output"], 2)
        y = rms_norm(x, w["mlp_norm"], eps)
        gate = y @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
    return rms_norm(x, np.asarray(params["norm"], np.float64), eps)


# --- merging ----------------------------------------------------------------------------------------------------


def slerp(a, b, t):
    """Shoemake's formula on flat float64 vectors."""
    omega = np.arccos(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return np.sin((1 - t) * omega) / np.sin(omega) * a + np.sin(t * omega) / np.sin(omega) * b
