"""The front door: OpenAI-compatible HTTP on Ray Serve; route, stream, resume."""
