"""One client of OpenAI-compatible servers."""
