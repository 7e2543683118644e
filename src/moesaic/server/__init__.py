"""HTTP for many users: the OpenAI, Anthropic and Ollama APIs over one engine.

`conversation` holds what all three have in common (messages, tools, events of an answer); `operation` is how a route
says what it takes and gives. Routes know neither models nor schedulers.
"""
