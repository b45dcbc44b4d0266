"""The best parameters of a model, by cross-validation: one call for each combination, the data shared once.

    python -m pip install scikit-learn
    python examples/parameter_search.py
"""
import itertools

from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

import clupy


def score(data, gamma, penalty):
    """The mean share of pictures that a model with these parameters recognizes."""
    pictures, digits = data
    return cross_val_score(SVC(gamma=gamma, C=penalty), pictures, digits, cv=3).mean()


if __name__ == "__main__":
    data = clupy.share(load_digits(n_class=6, return_X_y=True))       # passed as a Ref, it arrives as the arrays
    grid = list(itertools.product([0.0001, 0.001, 0.01], [1, 10]))
    scores = [clupy.parallel(score, timeout="5m")(data, gamma, penalty) for gamma, penalty in grid]
    clupy.wait_all(scores, progress=True)
    table = sorted(((future.result(), *parameters) for future, parameters in zip(scores, grid)), reverse=True)
    for mean, gamma, penalty in table:
        print(f"{mean:.3f} with gamma={gamma}, C={penalty}")
