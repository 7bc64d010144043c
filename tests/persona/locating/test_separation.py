"""Cluster metrics against their definitions, and a probe that is honest about chance and about blocks."""

import numpy as np
import pytest

from persona.locating.samples import Sample, balanced
from persona.locating.separation import principal_components, probe_auc, separation, shuffled_separations


def sample(shift: float, n: int = 60, width: int = 20, seed: int = 0) -> Sample:
    """Rows of noise; the label shifts the first unit, in which they vary most."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(n, width)).astype(np.float32)
    labels = np.arange(n) % 2 == 1
    hidden[:, 0] *= 3
    hidden[labels, 0] += shift
    return Sample(hidden_ND=hidden, labels_N=labels, blocks_N=np.arange(n))


def test_principal_components_are_those_of_the_covariance():
    rows = sample(4.0).hidden_ND.astype(np.float64)
    found, explained = principal_components(rows.astype(np.float32), 3)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    expected = (rows - rows.mean(axis=0)) @ vectors[:, ::-1][:, :3]
    # The sign of a component is free.
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-4, atol=1e-4)
    assert explained == pytest.approx(values[::-1][:3].sum() / values.sum(), rel=1e-5)


def test_cluster_metrics_are_those_of_the_definitions():
    of = sample(4.0)
    found = separation(of, n_components=3, seed=0)
    rows, _ = principal_components(of.hidden_ND, 3)
    sides = [rows[of.labels_N], rows[~of.labels_N]]

    coefficients = []
    for mine, other in (sides, sides[::-1]):
        for row in mine:
            within = np.linalg.norm(mine - row, axis=1).sum() / (len(mine) - 1)
            to_other = np.linalg.norm(other - row, axis=1).mean()
            coefficients.append((to_other - within) / max(within, to_other))
    assert found.silhouette == pytest.approx(np.mean(coefficients))

    centers = [side.mean(axis=0) for side in sides]
    between = sum(
        len(side) * ((center - rows.mean(axis=0)) ** 2).sum() for side, center in zip(sides, centers, strict=True)
    )
    within = sum(((side - center) ** 2).sum() for side, center in zip(sides, centers, strict=True))
    assert found.calinski_harabasz == pytest.approx(between / (within / (len(rows) - 2)))

    spreads = [np.linalg.norm(side - center, axis=1).mean() for side, center in zip(sides, centers, strict=True)]
    assert found.davies_bouldin == pytest.approx(sum(spreads) / np.linalg.norm(centers[0] - centers[1]))


def test_a_strong_signal_is_separated_and_shuffled_labels_are_not():
    of = sample(12.0)
    found, shuffled = separation(of, n_components=3, seed=0), shuffled_separations(of, n_components=3, seed=0)
    assert found.auc > 0.9
    assert found.silhouette > 0.3
    assert len(shuffled) == 5
    assert abs(np.mean([one.auc for one in shuffled]) - 0.5) < 0.15
    assert all(abs(one.silhouette) < 0.1 for one in shuffled)


def test_a_probe_reads_what_varies_little_and_cluster_metrics_do_not():
    draw = np.random.default_rng(1)
    hidden = draw.normal(size=(200, 30)).astype(np.float32) * 5
    labels = np.arange(200) % 2 == 1
    hidden[:, 7] = 0.1 * draw.normal(size=200) + 0.2 * labels
    found = separation(Sample(hidden_ND=hidden, labels_N=labels, blocks_N=np.arange(200)), n_components=3, seed=0)
    assert found.auc > 0.75
    assert abs(found.silhouette) < 0.05


def test_without_a_signal_a_probe_is_at_chance():
    aucs = [probe_auc(sample(0.0, seed=seed), seed=0) for seed in range(5)]
    assert abs(np.mean(aucs) - 0.5) < 0.1  # three standard errors of five AUCs of 60 rows


def test_rows_of_a_block_are_never_on_both_sides_of_a_fold():
    """Every block has its own direction and one label: a probe that sees a block before would know its label."""
    draw = np.random.default_rng(2)
    blocks = np.repeat(np.arange(20), 6)
    hidden = (10 * draw.normal(size=(20, 40))[blocks] + 0.01 * draw.normal(size=(120, 40))).astype(np.float32)
    aucs = []
    for _ in range(5):
        labels = draw.permutation(np.arange(20) % 2 == 1)[blocks]
        aucs.append(probe_auc(Sample(hidden_ND=hidden, labels_N=labels, blocks_N=blocks), seed=0))
    assert np.mean(aucs) < 0.7  # three standard errors of five AUCs of twenty blocks
    assert probe_auc(Sample(hidden_ND=hidden, labels_N=labels, blocks_N=np.arange(120)), seed=0) > 0.99


def test_equal_rows_and_too_few_blocks_have_no_numbers():
    equal = Sample(hidden_ND=np.ones((20, 5), np.float32), labels_N=np.arange(20) % 2 == 0, blocks_N=np.arange(20))
    found = separation(equal, n_components=3, seed=0)
    assert np.isnan(found.silhouette) and np.isnan(found.davies_bouldin) and np.isnan(found.explained)
    assert found.auc == 0.5
    few = Sample(hidden_ND=np.eye(8, dtype=np.float32), labels_N=np.arange(8) % 2 == 0, blocks_N=np.arange(8) // 2)
    assert np.isnan(probe_auc(few, seed=0))


def test_labels_are_shuffled_among_blocks_of_one_label():
    rows = Sample(hidden_ND=np.zeros((60, 1)), labels_N=np.repeat([True, False], 30), blocks_N=np.arange(60) // 3)
    shuffled = rows.shuffled(np.random.default_rng(0))
    assert shuffled.labels_N.sum() == 30
    assert not np.array_equal(shuffled.labels_N, rows.labels_N)
    assert all(len(set(of_block)) == 1 for of_block in shuffled.labels_N.reshape(20, 3))


def test_labels_are_exchanged_within_blocks_of_both():
    labels = np.tile([True, True, False, False], 50)
    rows = Sample(hidden_ND=np.zeros((200, 1)), labels_N=labels, blocks_N=np.arange(200) // 4)
    shuffled = rows.shuffled(np.random.default_rng(0)).labels_N.reshape(50, 4)
    kept = (shuffled == labels.reshape(50, 4)).all(axis=1)
    exchanged = (shuffled != labels.reshape(50, 4)).all(axis=1)
    assert (kept | exchanged).all()
    assert 10 < kept.sum() < 40


def test_a_balanced_sample_has_as_many_rows_of_each_label():
    rows = Sample(hidden_ND=np.arange(10.0)[:, None], labels_N=np.arange(10) < 3, blocks_N=np.arange(10))
    found = balanced(rows, np.random.default_rng(0))
    assert (len(found.labels_N), found.labels_N.sum(), len(set(found.hidden_ND.ravel()))) == (6, 3, 6)
