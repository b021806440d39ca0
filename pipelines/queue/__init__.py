"""The queue of subjects, kept in storage."""
