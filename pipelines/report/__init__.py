"""Finished results as pages and pictures: pure functions of what is stored."""
