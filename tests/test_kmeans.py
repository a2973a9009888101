"""k-means finds clusters that are known, whatever the seed, and leaves no cluster empty."""

import numpy as np
import pytest

from mtsql.rl.kmeans import cluster, medoids

CENTERS = np.array([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 5.0, 5.0]])


def three_clusters(sizes):
    """Points around `CENTERS`, and which center each belongs to."""
    noise = np.random.default_rng(1).normal(0, 0.5, (sum(sizes), 3))
    owners = np.repeat(range(3), sizes)
    return CENTERS[owners] + noise, owners


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sizes", [(7, 7, 6), (18, 1, 1), (1, 14, 5)])
def test_known_clusters_are_found_from_any_seed(sizes, seed):
    points, owners = three_clusters(sizes)
    labels = cluster(points, 3, seed)
    pairs = set(zip(owners.tolist(), labels.tolist()))
    assert len(pairs) == 3 and len({label for _, label in pairs}) == 3
    chosen = medoids(points, 3, seed)
    assert sorted(owners[chosen]) == [0, 1, 2]
    for place in chosen:
        members = points[owners == owners[place]]
        sums = [np.linalg.norm(members - member, axis=1).sum() for member in members]
        own = np.linalg.norm(members - points[place], axis=1).sum()
        assert own == pytest.approx(min(sums))


@pytest.mark.parametrize("seed", range(4))
def test_equal_points_still_give_k_medoids(seed):
    assert len(set(medoids(np.ones((6, 2)), 3, seed))) == 3
    two_places = np.array([[0.0], [0.0], [0.0], [9.0]])
    assert len(set(medoids(two_places, 3, seed))) == 3


def test_no_more_points_than_clusters_are_all_chosen():
    assert medoids(np.zeros((2, 4)), 3, 0) == [0, 1]
    assert medoids(np.zeros((3, 4)), 3, 0) == [0, 1, 2]


def test_the_same_seed_gives_the_same_clusters_in_any_type():
    points = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    assert medoids(points, 3, 5) == medoids(points.astype(np.float64), 3, 5)
