"""Ollama's API over the one model that is served.

`schema` is its JSON; `options` and `translate` make conversations of requests, `answers` objects of answers; `chat`,
`generate` and `models` are its routes.
"""
