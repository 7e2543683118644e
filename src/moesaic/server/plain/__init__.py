"""Routes of no other API: health, metrics, the server's version and description, tokens of a text."""
