"""A client for OpenAI-compatible servers."""
