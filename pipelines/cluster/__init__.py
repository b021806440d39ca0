"""Ray, collectives, preemption, metrics, logs, TLS."""
