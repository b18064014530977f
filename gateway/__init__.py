"""The front door: OpenAI-compatible HTTP that routes, streams and resumes. Imports policies, transports and cluster."""
