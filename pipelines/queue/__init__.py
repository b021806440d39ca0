"""Who does what next, remembered in storage."""
