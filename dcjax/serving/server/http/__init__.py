"""The deployed policy over HTTP, as OpenAI's clients speak it."""
