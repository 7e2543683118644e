"""Anthropic's messages API.

`schema` is its JSON; `translate` and `history` make conversations of requests, `blocks` messages of answers.
"""
