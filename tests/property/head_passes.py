"""Passes that fill a head's statistics in batches of given sizes."""


def fit(head, x, y, sizes, seed=0):
    head.begin_fit(len(y), seed)
    feed(head, x, y, sizes)
    head.end_fit()


def feed(head, x, y, sizes):
    start, turn = 0, 0
    while start < len(y):
        size = sizes[turn % len(sizes)]
        head.update(x[start : start + size], y[start : start + size])
        start, turn = start + size, turn + 1
