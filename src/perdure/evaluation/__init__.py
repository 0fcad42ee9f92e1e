"""Figures of a run and of a comparison: pure functions of the accuracy matrix, intervals over seeds, the ledger."""
