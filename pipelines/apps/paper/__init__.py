"""The paper's experiments on the miniature: rows of settings, tables, a page."""
