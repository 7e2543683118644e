"""Many requests at once: scheduling, sampling and text of requests over one runner.

The interfaces are in `params` (what is asked), `outputs` (what comes back), `runner` (who computes) and `interface`
(what a server sees of the engine).
"""
