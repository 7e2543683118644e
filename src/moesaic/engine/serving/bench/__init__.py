"""Load for a server or an engine, and what is measured under it: times of tokens, rates, and the bound that bytes set.

`load` says what is asked and when, `drive` asks, `figures` makes numbers of the times, `bound` of bytes. None of these
imports torch, so that a client of a server starts at once; `routing` and `subject` know models.
"""
