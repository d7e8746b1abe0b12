"""Several commands one after the other in the same processes, which spares a test most of their start:

torchrun ... tests/several_runs.py train FLAGS -- eval FLAGS -- ...

Afterwards the first rank prints the bytes that each kind of collective was handed.
"""

import itertools
import json
import sys

import eval as evaluation
import train
from teamtr_min.ranks import Ranks, join

if __name__ == "__main__":
    ranks, leave = join(), Ranks.leave
    train.join = evaluation.join = lambda: ranks
    Ranks.leave = lambda self, code: code
    for separator, words in itertools.groupby(sys.argv[1:], lambda word: word == "--"):
        if not separator:
            program, *flags = words
            if code := {"train": train, "eval": evaluation}[program].main(flags):
                leave(ranks, code)
    print("payload", json.dumps(ranks.payload))
    sys.exit(leave(ranks, 0))
