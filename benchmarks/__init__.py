"""Measurements and the drivers behind results/; run from the repository root.

    python -m benchmarks.loop       # a training step through the Learner against a hand-written loop: speed/loop.json
    python -m benchmarks.startup    # processor time of `perdure --help` and `perdure methods`: speed/startup.json
    python -m benchmarks.atoms      # the MoRAM layer against dense masking and PEFT LoRA: speed/atoms.json
    perdure sweep RECIPE --table results/tuning/RECIPE.json   # rates of every arm, see docs/sweep.md: tuning/
    python -m benchmarks.ledger RECIPE    # every arm over seeds, appended to ledger.jsonl
    python -m benchmarks.pretrain   # the small language model that the recipe lm/domains starts from

Speed and memory are ratios of interleaved pairs, so that drift and neighbours hit both arms alike.
"""
