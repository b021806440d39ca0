"""The loss, the model, its engines and the loop; the memory and cost of a step."""
