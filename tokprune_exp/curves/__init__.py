"""Results of a sweep as curves of accuracy against FLOPs: `python -m tokprune_exp.curves SWEEP_DIR …`.

read.py       result.json files → `Run`s, and what was left out
axes.py       what a point costs, and in which unit a metric is shown
points.py     `Run`s → a `TaskCurves` per task: operating points, their seeds averaged, Pareto fronts, dense references
published.py  published.csv: the papers' own points
tables.py     curves.csv and the table on the screen
style.py      colours, markers and words that both pictures share
figure.py     PNG, for a paper
page.py       HTML, to look closer
wandb_run.py  the same in one W&B run
"""
