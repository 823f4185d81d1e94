"""The figures of an analysis: PNGs of one column's width, each a group-by on its tables.

inputs.py        the tables, read when they are asked for
canvas.py        paper and look
word_classes.py  retention and lift per class of words; per layer
words.py         the words that are kept most, by class: bars and clouds
domain_terms.py  the words of the domain
lengths.py       sequence length through the layers
thresholds.py    learned thresholds
states.py        t-SNE of the states
sentence.py      one sentence, layer by layer
draw.py          all of them
wandb_run.py     the same and the page as one W&B run
"""
