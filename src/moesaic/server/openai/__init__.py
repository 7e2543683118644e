"""OpenAI's API: models, chat completions, completions, responses; and what open servers commonly add to it.

Every module with routes has a tuple `OPERATIONS`. What is read is in `*_types`, what is translated into a conversation
in `*_input`, and events become answers in the modules with routes and in `response_writer`.
"""
