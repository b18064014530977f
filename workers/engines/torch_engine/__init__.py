"""The default engine: `transformers` models under our own step loop and paged block pool."""
