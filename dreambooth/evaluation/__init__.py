"""How like the subject are the samples? Similarities of embeddings, as the paper measures them (its section 4.1)."""
