"""How models write thoughts and tool calls: one file per style, found from the chat template's text."""
