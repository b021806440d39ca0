"""A blind comparison of two models by people: questions, page, answers, shares."""
