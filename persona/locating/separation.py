"""How well the rows of two labels are separated in one layer: by cluster metrics, and by a held-out linear probe.

Cluster metrics see only the directions in which the rows vary most, so they say whether a persona dominates a layer. A
probe also finds directions of little variance, so it says whether the persona can be read there at all.

Shapes: N rows, D LLM width, C principal components.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona.errors import UsageError
from persona.locating.samples import Sample

FOLDS = 5
SHUFFLES = 5


@dataclass(frozen=True, kw_only=True)
class Separation:
    """Metrics of one layer; NaN where they are not defined, as for rows that are all equal.

    Attributes:
        silhouette: mean silhouette coefficient, from -1 to 1.
        calinski_harabasz: variance between the labels over that within them.
        davies_bouldin: spread of the labels over their distance; lower is better.
        auc: area under the ROC curve of a ridge regression on rows that it was not fitted on; 0.5 by chance.
        explained: share of the variance that the principal components hold.
    """

    silhouette: float
    calinski_harabasz: float
    davies_bouldin: float
    auc: float
    explained: float


def check_installed() -> None:
    """Raises UsageError without scikit-learn."""
    try:
        import sklearn
    except ModuleNotFoundError as error:
        raise UsageError("jobs.locate needs scikit-learn: pip install 'persona-plug[locate]'") from error
    del sklearn


def separation(sample: Sample, *, n_components: int, seed: int) -> Separation:
    """The metrics of a sample; the cluster metrics on its first `n_components` principal components."""
    components_NC, explained = principal_components(sample.hidden_ND, n_components)
    return _separation(sample, components_NC, explained, seed)


def shuffled_separations(sample: Sample, *, n_components: int, seed: int) -> list[Separation]:
    """The same for `SHUFFLES` shufflings of the labels: what the metrics are by chance."""
    components_NC, explained = principal_components(sample.hidden_ND, n_components)
    draw = np.random.default_rng([seed, 1])
    return [_separation(sample.shuffled(draw), components_NC, explained, seed) for _ in range(SHUFFLES)]


def principal_components(hidden_ND: NDArray[np.float32], n_components: int) -> tuple[NDArray[np.float64], float]:
    """The rows on their first principal components (N, C), and the share of the variance that these hold.

    C is at most N - 1 and D.
    """
    from sklearn.decomposition import PCA

    n_components = min(n_components, len(hidden_ND) - 1, hidden_ND.shape[1])
    # The first layer may have the same state for all rows.
    if np.ptp(hidden_ND, axis=0).max() == 0:
        return np.zeros((len(hidden_ND), n_components)), float("nan")
    pca = PCA(n_components=n_components, svd_solver="full").fit(hidden_ND.astype(np.float64))
    return pca.transform(hidden_ND.astype(np.float64)), float(pca.explained_variance_ratio_.sum())


def probe_auc(sample: Sample, seed: int) -> float:
    """The AUC of a ridge regression of the labels on standardized states: the mean over held-out rows of `FOLDS` folds.

    With more units than rows, it costs a product of rows by rows. The penalty equals the number of units, so it weighs
    the same whatever the width. NaN if one label is in fewer blocks than there are folds.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if any(len(np.unique(sample.blocks_N[sample.labels_N == label])) < FOLDS for label in (False, True)):
        return float("nan")
    hidden_ND = sample.hidden_ND.astype(np.float64)
    aucs = []
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for fitted, held_out in folds.split(hidden_ND, sample.labels_N, sample.blocks_N):
        if len(np.unique(sample.labels_N[fitted])) < 2 or len(np.unique(sample.labels_N[held_out])) < 2:
            continue  # a block may be larger than a fold
        probe: Any = make_pipeline(StandardScaler(), RidgeClassifier(alpha=hidden_ND.shape[1]))
        probe.fit(hidden_ND[fitted], sample.labels_N[fitted])
        aucs.append(roc_auc_score(sample.labels_N[held_out], probe.decision_function(hidden_ND[held_out])))
    return float(np.mean(aucs)) if aucs else float("nan")


def _separation(sample: Sample, components_NC: NDArray[np.float64], explained: float, seed: int) -> Separation:
    from sklearn import metrics

    clusters = dict.fromkeys(("silhouette", "calinski_harabasz", "davies_bouldin"), float("nan"))
    if np.ptp(components_NC, axis=0).max() > 0:
        clusters = {
            "silhouette": float(metrics.silhouette_score(components_NC, sample.labels_N)),
            "calinski_harabasz": float(metrics.calinski_harabasz_score(components_NC, sample.labels_N)),
            "davies_bouldin": float(metrics.davies_bouldin_score(components_NC, sample.labels_N)),
        }
    return Separation(**clusters, auc=probe_auc(sample, seed), explained=explained)
