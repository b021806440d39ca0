"""One HTTP service for many subjects, on Ray Serve."""
