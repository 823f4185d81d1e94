"""What a model kept: every token of a split with what it is in the language, and the figures that follow from that.

The way of the data: `texts` and `terms` (the split, the words of its classes) → `passes` (the model, dense and pruned)
→ `tagging`, `words` → `tokens` (the long table, of which everything else is a group-by) → `units`, `resampling` →
`retention`, `frequency`, `lengths`, `scores`, `forced`, `states` → `claims`. `study.py` runs all that.
"""
