"""The HTTP server: OpenAI's API (and vLLM's additions) in front of one engine."""
