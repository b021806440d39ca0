"""Everything before work starts: checks, lanes, memory, time, manifests, doctor."""
