"""Files wherever fsspec reaches: publish, fetch, and what a fault means."""
