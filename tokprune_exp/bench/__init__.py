"""Speed by the clock: of a trained model, of choosing tokens, of training; each against what it is compared with.

    python -m tokprune_exp.bench MODEL_DIR     a model against its dense self and other runtimes    speed.py
    python -m tokprune_exp.bench selection     a threshold against top-k (LTP, Fig. A.6)            selection.py
    python -m tokprune_exp.bench training      an epoch of each method against plain transformers   training.py

The order to read in: `arguments` → `texts` → `points` → `variants`, `peers` → `race` → `shares`, `accuracy` → `report`.
"""
