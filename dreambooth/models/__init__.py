"""Base models: find, download, check, hash, load and write them, whole or as a delta."""
