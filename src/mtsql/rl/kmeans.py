"""k-means for few points, in float64 and without matmuls: its result does not depend on threads.

Legend: N points, k clusters, W width of a point.
"""

import numpy as np

NUM_STARTS = 10
"""k-means finds a local optimum; the best of this many starts is taken."""
MAX_ITERATIONS = 100


def medoids(points: np.ndarray, k: int, seed: int) -> list[int]:
    """Cluster `points` (N, W) into k clusters and return the index of each cluster's medoid, in
    ascending order: the member with the least sum of distances to the other members, the first of
    equal ones. With N <= k each point is one. The seed draws the starts."""
    points = np.asarray(points, np.float64)
    if len(points) <= k:
        return list(range(len(points)))
    labels = cluster(points, k, seed)
    chosen = []
    for number in range(k):
        members = np.flatnonzero(labels == number)
        sums = np.sqrt(_squared_distances(points[members], points[members])).sum(1)
        chosen.append(int(members[sums.argmin()]))
    return sorted(chosen)


def cluster(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The cluster (N,) of each of `points` (N, W), N >= k, by k-means with k-means++ starts. No
    cluster is empty, even if points are equal."""
    rng = np.random.default_rng(seed)
    best, best_sum = np.zeros(len(points), int), np.inf
    for _ in range(NUM_STARTS):
        labels, total = _lloyd(points, _start(points, k, rng))
        if total < best_sum:
            best, best_sum = labels, total
    return best


def _start(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next center (k, W) is a point drawn with a
    probability in proportion to its squared distance from the nearest center so far."""
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < k:
        nearest = _squared_distances(points, points[chosen]).min(1)  # (N,)
        if not nearest.any():  # all points are centers already, or equal to one
            rest = [place for place in range(len(points)) if place not in chosen]
            chosen.append(rest[int(rng.integers(len(rest)))])
            continue
        chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum())))
    return points[chosen]


def _lloyd(points: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, float]:
    """Move `centers` (k, W) until the labels stay. -> (labels (N,), the sum of squared distances
    from the points to the means of their clusters)."""
    k = len(centers)
    labels = np.full(len(points), -1)
    for _ in range(MAX_ITERATIONS):
        distances = _squared_distances(points, centers)  # (N, k)
        new = _without_empty(distances.argmin(1), distances, k)
        if (new == labels).all():
            break
        labels = new
        centers = np.stack([points[labels == number].mean(0) for number in range(k)])
    total = sum(((points[labels == number] - centers[number]) ** 2).sum() for number in range(k))
    return labels, float(total)


def _without_empty(labels: np.ndarray, distances: np.ndarray, k: int) -> np.ndarray:
    """The labels (N,), where each empty cluster gets the point that is farthest from its own
    center (distances (N, k)) and is not alone in its cluster."""
    labels = labels.copy()
    for number in range(k):
        if (labels == number).any():
            continue
        sizes = np.bincount(labels, minlength=k)
        own = distances[np.arange(len(labels)), labels]
        labels[np.where(sizes[labels] > 1, own, -1.0).argmax()] = number
    return labels


def _squared_distances(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(N, W) and (k, W) -> (N, k)."""
    squares: np.ndarray = ((points[:, None] - centers[None]) ** 2).sum(-1)
    return squares
