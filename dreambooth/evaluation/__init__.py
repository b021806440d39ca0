"""Evaluation by similarities of embeddings, as in the paper (section 4.1): encoders, figures, intervals, verdicts."""
