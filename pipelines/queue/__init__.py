"""The queue of subjects: who does what next, kept in storage."""
