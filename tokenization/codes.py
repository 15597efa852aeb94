"""Codes that mean something: tokens used alike share their leading digits, so that a partly known token is readable.

A random shuffle makes the state "first six digits known" a random set of tokens. Here a code tree is grown over
vectors of the tokens by recursive balanced bisection (word classes as of Brown et al., Computational Linguistics 18,
1992; hierarchical vocabularies in masked diffusion: HDLM, arXiv:2510.08632). The result is a table C (V, S) like any
other: an injective map of tokens to digits, so every bound holds with it.
"""

import numpy as np

NUM_CONTEXTS, NUM_DIMENSIONS = 2048, 64  # columns of the co-occurrence matrix a side, width of the vectors
REFINEMENTS = 20  # most rounds of a split; few are needed
ROUNDING = 1e-10  # of the longest vector: what is shorter is the rounding of a zero, whose direction means nothing
ZERO = 1e-6  # of the largest singular value: smaller ones are noise, since Lanczos has squares of them
MOST_DENSE = 1024  # smaller side up to which a matrix is decomposed whole: exact for low ranks too, the same each time
SOURCES = ("similarity", "clusters", "frequency")


def codes_from_text(
    source: str, blocks: np.ndarray, vocab_size: int, base: int, num_subtokens: int
) -> tuple[np.ndarray, int]:
    """The table C (V, S) int64 of a `source`, and its FLOPs.

    "similarity": tokens with like neighbours share leading digits, as many tokens each prefix; "clusters": the same,
    in parts of their natural size, which needs more than log_base V digits; "frequency": tokens of like frequency.
    blocks (N, L): token ids of the training text.
    Raises ValueError for another source and a vocabulary that the codes do not hold.
    """
    if source not in SOURCES:
        raise ValueError(f"codes={source!r} is not one of {', '.join(SOURCES)}")
    if source == "frequency":
        counts = np.bincount(blocks.reshape(-1), minlength=vocab_size)
        vectors, flops = np.log1p(counts)[:, None], blocks.size
    else:
        vectors, flops = neighbour_vectors(blocks, vocab_size)
    table = tree_codes(vectors, base, num_subtokens, is_balanced=source != "clusters")
    return table, flops + tree_flops(vectors.shape, num_subtokens)


def neighbour_vectors(blocks: np.ndarray, vocab_size: int, width: int = NUM_DIMENSIONS) -> tuple[np.ndarray, int]:
    """Vectors (V, K) float64 of the tokens from what stands left and right of them in blocks (N, L), and their FLOPs.

    Positive pointwise mutual information of token and neighbour, the most frequent neighbours of each side, reduced to
    K <= width singular values (Levy and Goldberg, NeurIPS 2014); rows have length 1, those of absent tokens 0.
    FLOPs: one for each pair of neighbours, and those of the decomposition. ValueError for blocks of one token.
    """
    from scipy.sparse import coo_matrix, hstack

    if blocks.shape[1] < 2:
        raise ValueError("blocks of 1 token hold no neighbours that say what it means; use a block_size of at least 2")
    counts = np.bincount(blocks.reshape(-1), minlength=vocab_size)
    contexts = np.argsort(-counts, kind="stable")[: min(NUM_CONTEXTS, vocab_size)]
    column = np.full(vocab_size, -1)
    column[contexts] = np.arange(len(contexts))
    left, right = blocks[:, :-1].reshape(-1), blocks[:, 1:].reshape(-1)
    sides = []
    for token, neighbour in ((left, right), (right, left)):
        kept = column[neighbour] >= 0
        ones = np.ones(kept.sum())
        shape = (vocab_size, len(contexts))
        sides.append(coo_matrix((ones, (token[kept], column[neighbour[kept]])), shape=shape).tocsr())
    joint = hstack(sides).tocoo()
    rows, columns = np.asarray(joint.sum(1)).ravel(), np.asarray(joint.sum(0)).ravel()
    information = np.log(joint.data * joint.data.sum() / (rows[joint.row] * columns[joint.col]))
    positive = coo_matrix((np.maximum(information, 0.0), (joint.row, joint.col)), shape=joint.shape).tocsr()
    left_vectors, values, flops = _largest_singular(positive, min(width, min(positive.shape) - 1))
    vectors = left_vectors * np.sqrt(values)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > ROUNDING * length.max(), length, np.inf), flops + 2 * blocks.size


def _largest_singular(matrix, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The left singular vectors (V, n) of the n <= number largest singular values (n,) above 0, these, and FLOPs."""
    from scipy.sparse.linalg import LinearOperator, svds

    smaller, larger = sorted(matrix.shape)
    if smaller <= MOST_DENSE:
        left, values, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
        left, values = left[:, :number], values[:number]
        flops = 6 * larger * smaller**2 + 20 * smaller**3  # Golub and Van Loan, Matrix Computations, figure 8.6.1
    else:
        products = 0

        def times(vector, by):
            nonlocal products
            products += 1
            return by @ vector

        operator = LinearOperator(
            matrix.shape, lambda vector: times(vector, matrix), lambda vector: times(vector, matrix.T), dtype=float
        )
        left, values, _ = svds(operator, k=number, random_state=0)
        # A step of Lanczos is a product with each side, and makes its vector orthogonal to those that are kept.
        flops = products * 2 * matrix.nnz + products // 2 * 4 * max(2 * number + 1, 20) * smaller
    kept = values > ZERO * values.max()
    return left[:, kept], values[kept], flops


def tree_flops(shape: tuple[int, ...], num_subtokens: int) -> int:
    """At most so many FLOPs has `tree_codes` of vectors (V, K): at each level the covariance and all rounds."""
    number, width = shape
    return num_subtokens * number * (2 * width * width + 2 * width * (2 * REFINEMENTS + 1))


def tree_codes(vectors: np.ndarray, base: int, num_subtokens: int, is_balanced: bool = True) -> np.ndarray:
    """The table C (V, S) int64 of a tree in which each split cuts tokens (vectors (V, K)) into `base` parts alike.

    A split orders the tokens along their first principal direction and cuts the order into parts of equal number; for
    two parts the direction is then moved to the difference of their means until the parts stay (balanced 2-means).
    is_balanced False: two parts meet halfway between their means, as far as the codes that are left hold them
    (2-means); ValueError for another base.
    """
    if not is_balanced and base != 2:
        raise ValueError(f"codes=clusters splits tokens in two, but base={base}; use base=2, or codes=similarity")
    number = len(vectors)
    if number > base**num_subtokens:
        raise ValueError(f"{number} tokens do not fit in {num_subtokens} digits of base {base}; use more digits")
    codes = np.zeros((number, num_subtokens), dtype=np.int64)
    nodes = [np.arange(number)]
    for digit in range(num_subtokens):
        room = base ** (num_subtokens - digit - 1)
        children = []
        for node in nodes:
            for value, part in enumerate(_split(vectors[node], base, room, is_balanced)):
                codes[node[part], digit] = value
                if len(part):
                    children.append(node[part])
        nodes = children
    return codes


def _split(vectors: np.ndarray, base: int, room: int, is_balanced: bool) -> list[np.ndarray]:
    """Positions of `base` parts, each within `room`, of equal number if balanced; last ones empty for few tokens."""
    number = len(vectors)
    parts = max(1, min(base, number), -(-number // room))
    if number == 1:
        return [np.arange(1)]
    direction = _principal_direction(vectors)
    cuts = np.linspace(0, number, parts + 1).round().astype(int)
    order = np.argsort(vectors @ direction, kind="stable")
    for _ in range(REFINEMENTS if parts == 2 else 0):
        low, high = vectors[order[: cuts[1]]].mean(0), vectors[order[cuts[1] :]].mean(0)
        places = vectors @ (high - low)
        moved, cut = np.argsort(places, kind="stable"), cuts[1]
        if not is_balanced:
            nearer = (places < (high + low) @ (high - low) / 2).sum()
            cut = np.clip(nearer, max(1, number - room), min(number - 1, room))
        if set(moved[:cut]) == set(order[: cuts[1]]):
            break
        order, cuts = moved, np.array([0, cut, number])
    return [order[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]


def _principal_direction(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    direction = directions[:, -1]
    # The sign of an eigenvector is arbitrary; the largest entry is made positive.
    return direction * np.sign(direction[np.abs(direction).argmax()])
